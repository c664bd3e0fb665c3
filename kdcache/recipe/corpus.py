"""The part of a recipe that says where text comes from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, StrictInt, model_validator

from kdcache.recipe.section import Identifier, PositiveInt, Section, Share

#: More copies of a row than anyone wants.
MAX_COPIES = 1000


class AugmentSection(Section):
    """Masked copies of rows: samples of their own, with the gold label of the row.

    Every word becomes the mask token with some probability (MKD). A copy follows its row, and
    teachers label it as any other sample.
    """

    copies: PositiveInt = Field(
        10, le=MAX_COPIES, description="Copies of every row; a task's own number comes first."
    )
    probability: Share = Field(0.1, gt=0, description="That a word is masked, each by itself.")
    mask: str = Field(
        "[MASK]",
        min_length=1,
        description="What stands for a masked word: the mask token of the streams' tokenizers.",
    )
    fields: list[Identifier] | None = Field(
        None, min_length=1, description="Where words are masked; null: all fields but the label."
    )
    mark: Identifier = Field(
        "copy",
        description="Name of a further field, which says 0 of a row and 1, 2... of its copies; "
        "`kdcache compile --filter 'copy.number == 0'` keeps the rows.",
    )
    seed: StrictInt = Field(1, ge=0, description="Another seed masks other words.")


class TaskSection(Section):
    """Where the text of one task comes from. Row n of every field belongs together."""

    format: Literal["text", "tsv", "jsonl", "parquet"] = Field(
        "text",
        description="text: one file per field, a line a row (.gz is read as it is); tsv: a header "
        "line and no quoting; jsonl: an object per line, whose values are text, or messages (a "
        "list of objects with `role` and `content`); parquet.",
    )
    path: str | None = Field(
        None, description="The file of a tsv, jsonl or parquet corpus; none for text."
    )
    fields: dict[Identifier, str] = Field(
        min_length=1,
        description="Field name to its file (text) or column (other formats). "
        "Translation uses src and tgt.",
    )
    limit: PositiveInt | None = Field(None, description="Read this many rows; all without it.")
    copies: StrictInt | None = Field(
        None,
        ge=0,
        le=MAX_COPIES,
        description="Of a task: masked copies of every row, 0 for none; null: as many as "
        "corpus.augment says.",
    )

    @model_validator(mode="after")
    def _path_fits_format(self) -> TaskSection:
        if self.format == "text" and self.path is not None:
            raise ValueError("a text corpus has one file per field; leave out path")
        if self.format != "text" and self.path is None:
            raise ValueError(f"a {self.format} corpus needs path")
        return self


class CorpusSection(TaskSection):
    """Where text comes from: one corpus, or several tasks one after another."""

    fields: dict[Identifier, str] = Field(
        default_factory=dict,
        description="Field name to its file (text) or column (other formats). "
        "Translation uses src and tgt.",
    )
    without: list[Identifier] = Field(
        default_factory=list,
        description="More fields, of which there is no text: empty in every row. So sources alone "
        "(`without: [tgt]`) have the streams of a parallel corpus, and hypotheses can become their "
        "targets.",
    )
    empty: Literal["drop", "keep", "error"] = Field(
        "drop",
        description="What happens to a row with a field that is empty or white space: left out "
        "and counted, kept, or refused with its row number.",
    )
    detokenize: Literal["none", "wikitext"] = Field(
        "none",
        description="Put texts of every field but the label back into the form that people write, "
        "as GPT-2 read them. wikitext: WikiText's ` @-@ `, spaces before marks and within "
        "brackets and quotes. Words are counted as the files have them.",
    )
    label: Identifier | None = Field(
        None,
        description="The field that holds a sample's gold label (a class name, a score), in every "
        "task that has it.",
    )
    tasks: dict[Identifier, TaskSection] = Field(
        default_factory=dict,
        description="Several corpora in one cache, by name, in place of the keys above. Rows are "
        "numbered through all of them, in this order; a field that a task lacks is empty there.",
    )

    augment: AugmentSection | None = Field(
        None, description="Masked copies of the rows; null: none."
    )

    @model_validator(mode="after")
    def _copies_fit(self) -> CorpusSection:
        if self.copies is not None:
            raise ValueError("copies is a task's own; say augment.copies here")
        if self.augment is None:
            given = [name for name, task in self.tasks.items() if task.copies]
            if given:
                raise ValueError(f"tasks.{given[0]}.copies needs augment, which says how; give it")
            return self
        mark, known = self.augment.mark, self.field_names
        if known.count(mark) > 1 or mark in self.without:
            raise ValueError(f"augment.mark is {mark!r}, a field of the corpus; choose another")
        unfit = [n for n in self.augment.fields or () if n not in known or n in (mark, self.label)]
        if unfit:
            fit = [name for name in known if name not in (mark, self.label)]
            raise ValueError(f"augment.fields has {unfit[0]!r}; words can be masked in {fit}")
        return self

    @model_validator(mode="after")
    def _tasks_or_fields(self) -> CorpusSection:
        own = {"format": self.format != "text", "path": self.path, "fields": self.fields}
        given = [name for name, value in {**own, "limit": self.limit}.items() if value]
        if self.tasks and given:
            raise ValueError(f"every task has its own {given[0]}; give it there")
        if not self.tasks and not self.fields:
            raise ValueError("give fields, or tasks that have them")
        known = [name for part in self.parts.values() for name in part.fields]
        if both := [name for name in self.without if name in known]:
            raise ValueError(f"without names {both[0]!r}, which fields has; leave it out of one")
        if self.label not in (None, *self.field_names):
            raise ValueError(f"label is {self.label!r}; the fields are {self.field_names}")
        return self

    @property
    def parts(self) -> dict[str, TaskSection]:
        """What is read, by task; a corpus without tasks is one part with an empty name."""
        return dict(self.tasks) or {"": self}

    @property
    def field_names(self) -> list[str]:
        """The fields of all tasks, as they come first, and those without text."""
        found = [name for part in self.parts.values() for name in part.fields]
        mark = [self.augment.mark] if self.augment is not None else []
        return [*dict.fromkeys([*found, *self.without]), *mark]

    def copies_of(self, task: str) -> int:
        """Masked copies of every row of a task; its name is empty in a corpus without tasks."""
        if self.augment is None:
            return 0
        own = self.parts[task].copies
        return self.augment.copies if own is None else own

    def masked_fields(self, task: str) -> list[str]:
        """Where words of a task are masked."""
        if self.augment is None:
            return []
        chosen = self.augment.fields
        return [
            name
            for name in self.parts[task].fields
            if name != self.label and (chosen is None or name in chosen)
        ]

    @property
    def without_copies(self) -> CorpusSection:
        """The same rows alone."""
        return self.model_copy(update={"augment": None})
