"""`python -m halos_pl chat DIR`: talk to an exported policy, or to any causal language model."""
