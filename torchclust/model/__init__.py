"""A whole model: which of its tensors are clustered and how, and the verbs that do it."""
