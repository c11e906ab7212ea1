"""The run-time type checker of the tests: beartype, to which an int is a float as it is to type checkers."""

from typing import Any, Self

from beartype import BeartypeConf, FrozenDict, beartype

# the import hook decorates functions one by one, where beartype cannot know what Self is
checked = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({Self: Any}), is_pep484_tower=True))
