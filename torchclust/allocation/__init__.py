"""Bytes shared out among tensors: what each costs, what each is worth, who gets how many."""
