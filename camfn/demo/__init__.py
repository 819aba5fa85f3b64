"""A trained network and scenes with known objects, to try, test and show maps.

>>> import camfn, torch
>>> from camfn import demo
>>> scene = demo.scene(3, classes=["star", "ring"])
>>> x = demo.preprocess(scene.image)[None]
>>> maps = camfn.score_cam(demo.network(), "features", x, torch.tensor([scene.classes]))[0]  # of the star and of the ring
>>> camfn.metrics.pointing_game(maps, scene.masks, tolerance=8)
tensor([1., 1.])
"""

from camfn.demo.network import network, preprocess
from camfn.demo.scenes import CLASSES, SIDE, Interventions, Scene, interventions, scene

__all__ = ["CLASSES", "SIDE", "Interventions", "Scene", "interventions", "network", "preprocess", "scene"]
