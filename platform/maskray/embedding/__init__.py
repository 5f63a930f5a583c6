"""Whole datasets to tables of embeddings, and what is seen in them."""
