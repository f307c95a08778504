"""Fitting codebooks to what layers see: unlabelled inputs, their moments, their outputs."""
