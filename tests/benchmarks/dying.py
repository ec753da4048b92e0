"""A side that works for one turn."""


def side(name):
    def dying(turns):
        with turns.turn(1):
            pass
        with turns.turn(1):
            1 / 0  # noqa: B018

    return dying, []
