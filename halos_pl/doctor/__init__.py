"""`python -m halos_pl doctor`: what is installed, which devices there are, and what is fast on them."""
