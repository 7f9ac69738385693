"""CARAFE++ in PyTorch: differentiable operators, modules, what replaces others."""
