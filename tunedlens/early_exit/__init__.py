"""Where the prediction of a lens is good enough to read no further layer."""

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
