"""What fills one seam of a method; parts of different seams add up to a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from kvc.methods.base import Method


class Part:
    """The base of the methods' dataclasses; `a + b` is the method that does both."""

    __slots__ = ()
    seam: ClassVar[str]
    section: ClassVar[str]  # the name that settings of this part begin with

    def __add__(self, other: Part | Method) -> Method:
        """The method with both parts.

        Raises:
            ConfigError: if both fill one seam, or make no sense together.
        """
        from kvc.methods.base import method_of

        return method_of(self) + other

    @classmethod
    def implied(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters that those which are given bring along, where a preset says otherwise."""
        return {}

    def conflict(self, other: Part) -> str | None:
        """Why this part cannot work with another one, of another seam; None if it can."""
        return None
