"""Cards: maps with the scores, weights, cost, findings and pictures behind them."""

from camfn.explanation.card import Explanation, load
from camfn.explanation.explain import AnyMethod, explain, prepared
from camfn.explanation.fields import Picture

__all__ = ["AnyMethod", "Explanation", "Picture", "explain", "load", "prepared"]
