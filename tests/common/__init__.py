"""What transformers' own common model tests need and the published sdist lacks."""
