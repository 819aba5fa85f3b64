"""Models by name, with their preprocessing and class names."""

from camfn.zoo.specs import Loaded, check_layers, class_of, classes_of, input_of, load, opened, outputs_of, targets_of, told

__all__ = ["Loaded", "check_layers", "class_of", "classes_of", "input_of", "load", "opened", "outputs_of", "targets_of", "told"]
