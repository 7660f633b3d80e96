"""Image encoders under one protocol: stage 1's students, stage 2's encoders, and teachers.

Importing the package imports every file in it, so that what a file registers is known by its name:
adding an encoder or a teacher is adding a file (:mod:`sami.encoders.registry` tells what to put
into it).
"""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
