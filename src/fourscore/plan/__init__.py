"""How much memory a run takes, before it takes any: what `fourscore plan` prints and the loader obeys."""
