"""One weight as a lookup into its codebook: how it is configured, computed, and trained."""
