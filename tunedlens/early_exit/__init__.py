"""Early exits: take the prediction of a lens at the first layer where it is good enough."""

from tunedlens.early_exit.measuring import early_exits
from tunedlens.early_exit.results import ChosenExit, EarlyExits, ExitCurve, ExitPoint
from tunedlens.early_exit.rules import SIGNALS, ExitRule, Signal, first_exit, signal_of

__all__ = [
    "SIGNALS",
    "ChosenExit",
    "EarlyExits",
    "ExitCurve",
    "ExitPoint",
    "ExitRule",
    "Signal",
    "early_exits",
    "first_exit",
    "signal_of",
]
