"""Training a policy against a frozen reference, on `transformers.Trainer` through the scoring core."""
