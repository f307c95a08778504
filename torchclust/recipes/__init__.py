"""``torchclust run``: from a recipe in YAML to files and a report, stage by stage."""
