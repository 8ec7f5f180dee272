"""Keeps the tokens of largest norm: an example of a scorer from outside ucc-search."""

from ucc_search import Scorer, hookimpl


class L2Norm(Scorer):
    """Euclidean norm of a token after the block's attention."""

    def score(self, view):
        return view.patches_BND.norm(dim=-1)


@hookimpl
def ucc_scorers():
    return {"l2_norm": L2Norm}
