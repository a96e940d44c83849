"""`python -m halos_pl data inspect`: what a training would see of some data, before it starts."""
