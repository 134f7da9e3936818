"""leaven: recipes, objectives and callbacks that make your vision backbone learn more, sooner.

Importing this package is cheap. Its rooms (``leaven.backbones``, ``leaven.pretext``, ``leaven.callbacks``)
are imported by name, and timm, torchvision, kornia and gpytorch, which take seconds each, in the calls that
need them.
"""

__version__ = "0.1.0"
