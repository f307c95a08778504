"""From a model to an ExecuTorch program (.pte) for Ethos-U, by PyTorch's own way.

`torchclust.export.to_pte` is the way in. The modules follow the model: ``observed`` traces it and
lets the backend place its observers, ``scales`` gives these what was trained, ``lowering`` makes
the program, ``tosa`` reads what the compiler was given, and ``program`` puts it together.
"""
