"""Preference rows: reading, checking, splitting, and a synthetic source with exact ground truth."""
