"""Teachers of the user's own classes."""

import sys

import pytest
import torch
from pydantic import ValidationError

from kdcache.dump.teacher import Teacher
from kdcache.dump.teachers.identity import own_record
from kdcache.dump.teachers.loading import load_teacher, teacher_positions
from kdcache.errors import ModelError
from kdcache.recipe import TeacherSection
from tests.dump.reading import batch_of


class Loud(Teacher):
    """A custom teacher: logits by rule, over eight ids."""

    signals = ("logits",)
    places = ("positions",)

    def __init__(self, section):
        self.record = own_record(section)
        self.device = torch.device("cpu")
        self.vocab_size = 8
        self.loudness = section.options["loudness"]

    @classmethod
    def load(cls, section, needs_attention):
        return cls(section)

    @classmethod
    def positions(cls, section):
        return 17

    def logits(self, batch, at):
        return torch.nn.functional.one_hot(batch.ids[at], 8) * self.loudness


NOTHING = 3


class Odd(Teacher):
    @classmethod
    def load(cls, section, needs_attention):
        return "odd"


class Bare(Teacher):
    pass


def custom(name, **options):
    return TeacherSection(path="x", kind="custom", model_class=name, options=options)


def test_options_are_for_classes_of_your_own():
    with pytest.raises(ValidationError, match="options go with kind custom alone"):
        TeacherSection(path="x", options={"head": "sst2"})


@pytest.fixture
def classes(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_teachers", sys.modules[__name__])


def test_a_class_of_your_own(classes):
    section = custom("my_teachers:Loud", loudness=2.5)
    teacher = load_teacher(section)
    assert teacher_positions(section) == 17
    batch = batch_of(teacher, [[1, 2, 3], [4, 5]])
    at = torch.tensor([[False, True, True], [False, True, False]])
    found = teacher.logits(batch, at)
    assert found.argmax(1).tolist() == [2, 3, 5]
    assert found.max() == 2.5
    pieces = list(teacher.logits_in_pieces(batch, at, 16))
    assert [len(piece) for piece in pieces] == [2, 1]
    assert torch.equal(torch.cat(pieces), found)
    for ask in (teacher.scores, lambda batch: teacher.hidden(batch, "encoder", [0])):
        with pytest.raises(ModelError, match=r"kind custom has no .*; it has logits"):
            ask(batch)
    louder = load_teacher(custom("my_teachers:Loud", loudness=3.0)).record
    assert louder.config_digest != teacher.record.config_digest
    assert louder.kind == "custom"


def test_the_record_of_ones_own_class_moves_with_its_files(tmp_path):
    (tmp_path / "weights").write_bytes(b"w")
    sections = [custom("my_teachers:Loud", loudness=2.5)]
    sections.append(sections[0].model_copy(update={"path": "elsewhere"}))
    with_files = [own_record(section, [tmp_path / "weights"]) for section in sections]
    assert with_files[0].config_digest == with_files[1].config_digest
    without = [own_record(section) for section in sections]
    assert without[0].config_digest != without[1].config_digest


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Loud", "expected module:Name"),
        ("no_such_module_here:Loud", "cannot import the module 'no_such_module_here' .No module"),
        ("my_teachers:Quiet", "the module has no 'Quiet'"),
        ("my_teachers:NOTHING", "no subclass of kdcache.dump.teacher.Teacher"),
        ("json:JSONDecoder", "no subclass of kdcache.dump.teacher.Teacher"),
        ("my_teachers:Odd", "its load gave str; expected a kdcache.dump.teacher.Teacher"),
        ("my_teachers:Bare", "the class has no classmethod load"),
    ],
)
def test_no_class_of_your_own(classes, name, message):
    with pytest.raises(ModelError, match=message) as error:
        load_teacher(custom(name))
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_a_load_that_breaks(tmp_path, monkeypatch):
    (tmp_path / "loading_teacher.py").write_text(
        "from kdcache.dump.teacher import Teacher\n"
        "class Name(Teacher):\n"
        "    @classmethod\n"
        "    def load(cls, section, needs_attention):\n"
        "        return section.options['head']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=r"KeyError: 'head'; loading_teacher.py, line 5") as error:
        load_teacher(custom("loading_teacher:Name"))
    assert "\n" not in str(error.value)


def test_a_module_that_breaks(tmp_path, monkeypatch):
    (tmp_path / "breaking_teacher.py").write_text("raise OSError('out of\\nluck')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=r"cannot import .*\(out of\)") as error:
        load_teacher(custom("breaking_teacher:Name"))
    assert "\n" not in str(error.value)
