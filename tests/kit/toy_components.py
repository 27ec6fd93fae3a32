"""Methods and an engine that consist of a configuration only, written into a temporary folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

ALPHA = """
from typing import Literal
from scaletrain.config.schema import Frozen, ComponentConfig
class Head(Frozen):
    hidden: int = 64
class Config(ComponentConfig):
    name: Literal["toyalpha"] = "toyalpha"
    tau: float = 0.99
    head: Head = Head()
    sizes: tuple[int, ...] = (10, 20)
"""


BETA = ALPHA.replace("toyalpha", "toybeta").replace("hidden: int", "layers: int")


ENGINE = """
from typing import Literal
from scaletrain.config.schema import ComponentConfig
class Config(ComponentConfig):
    name: Literal["toyengine"] = "toyengine"
    amp: bool = False
"""


TOY = "method: toyalpha\nengine: toyengine\n"


Write = Callable[..., Path]
