"""Exchanges between ranks."""

from ranks import RankPool

from ddp_cifar.distributed.world import World


class Unsendable(Exception):
    def __init__(self) -> None:
        self.function = lambda: None


def test_an_error_that_cannot_be_pickled_is_still_raised_on_every_rank(ranks: RankPool) -> None:
    assert ranks.run(fail_on_the_first, 2) == [["Unsendable()"] * 2] * 2


def fail_on_the_first(world: World) -> list[str]:
    def fail() -> None:
        raise Unsendable

    messages = []
    for together in (world.on_main, world.on_each_node):
        try:
            together(fail)
        except RuntimeError as error:
            messages.append(str(error))
    return messages
