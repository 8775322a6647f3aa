"""The published methods, each a preset of the three axes."""

from collections.abc import Callable
from functools import partial

from zoft.optim.methods.agzo import AGZO
from zoft.optim.methods.aimzo import AIMZO
from zoft.optim.methods.guided import Guided
from zoft.optim.methods.lozo import LOZO
from zoft.optim.methods.mezo import MeZO
from zoft.optim.methods.zoact import ZOAct
from zoft.optim.optimizer import ZeroOrder

METHODS: dict[str, Callable[..., ZeroOrder]] = {
    "mezo": MeZO,
    "lozo": LOZO,
    "lozo-m": partial(LOZO, momentum=0.9),
    "agzo": AGZO,
    "zo-act": ZOAct,
    "aim-zo": AIMZO,
    "guided": Guided,
}

__all__ = ["AGZO", "AIMZO", "LOZO", "METHODS", "Guided", "MeZO", "ZOAct"]
