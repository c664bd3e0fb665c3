"""The teachers of a recipe, one after another."""

from __future__ import annotations

import logging

from kdcache.dump.teacher import Teacher
from kdcache.dump.teachers.loading import load_teacher, teacher_positions
from kdcache.recipe import DumpSection, TeacherSection

logger = logging.getLogger(__name__)


class Teachers:
    """The teachers of a recipe, one in memory at a time."""

    def __init__(self, section: DumpSection) -> None:
        """Load nothing yet.

        Args:
            section: whose signals name their teachers.
        """
        self._section = section
        self._key: tuple[TeacherSection, bool] | None = None
        self._teacher: Teacher | None = None

    def ready(self, signal: str) -> bool:
        """Whether a signal needs no teacher, or the one that is loaded, or the first."""
        key = self._key_of(signal)
        return key is None or self._key in (None, key)

    def of(self, signal: str) -> Teacher | None:
        """The teacher of a signal, loaded in place of another one; None where none is needed."""
        key = self._key_of(signal)
        if key is None:
            return None
        if key != self._key:
            self._teacher = None  # before the next one takes memory
            logger.info("loading the teacher %s", key[0].label)
            self._teacher = load_teacher(key[0], needs_attention=key[1])
            self._key = key
        return self._teacher

    def same_model(self, signal: str) -> Teacher | None:
        """The teacher in memory if it is a signal's, whether loaded for attention or not."""
        key = self._key_of(signal)
        same = key is not None and self._key is not None and key[0] == self._key[0]
        return self._teacher if same else None

    def _key_of(self, signal: str) -> tuple[TeacherSection, bool] | None:
        section = self._section.teacher_of(signal)
        if section is None:
            return None
        # Attention probabilities need another implementation, which gives other float noise.
        return section, self._section.signals[signal].kind == "attention"

    def max_positions(self) -> int | None:
        """Longest input that all teachers of the recipe take; None for no limit."""
        sections = [self._section.teacher] if self._section.teacher else []
        for name in self._section.signals:
            section = self._section.teacher_of(name)
            if section is not None and section not in sections:
                sections.append(section)
        limits = [self._positions(section) for section in sections]
        return min((limit for limit in limits if limit is not None), default=None)

    def _positions(self, section: TeacherSection) -> int | None:
        if self._teacher is not None and self._key is not None and self._key[0] == section:
            return self._teacher.max_positions
        return teacher_positions(section)
