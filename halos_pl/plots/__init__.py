"""`python -m halos_pl plot PICTURE`: figures of the KTO report, drawn from this package's own functions."""
