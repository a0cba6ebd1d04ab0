"""A pair of transformers models as an artifact that needs neither torch nor transformers."""
