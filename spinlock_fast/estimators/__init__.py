"""What callers give to a tokenizer, and its interface of a scikit-learn transformer."""
