"""What a person sees: text on standard output, the rest on standard error, thoughts dimmed or hidden, Ctrl-C survived."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
import torch

from xmoe.generation.generate import Timing
from xmoe.generation.session import Said
from xmoe.generation.terminal import Terminal
from xmoe.model.config import preset

END = Said("", None, "length", Timing(3, 5, 0.25, 1.25))


class Session:
    """Answers each turn with the next list of pieces; an exception among them is raised."""

    kind = "harmony"
    source = None
    model = SimpleNamespace(config=preset("tiny"), device="cpu", embed=SimpleNamespace(weight=torch.zeros(1)))

    def __init__(self, *answers):
        self.answers, self.settings = list(answers), {}

    def ask(self, text):
        for piece in self.answers.pop(0):
            if isinstance(piece, BaseException):
                raise piece
            yield piece


class Screen(io.StringIO):
    def isatty(self):
        return True


THOUGHT = [Said("hm", "analysis"), Said("m", "analysis"), Said("yes", "final"), Said("!", "final"), END]


def test_thoughts_are_apart_and_figures_on_standard_error(capsys):
    Terminal(Session(THOUGHT), "x").answer_once("q")
    out, err = capsys.readouterr()
    assert out == "hmm\n\nyes!\n"
    assert err == "[5 tokens, 4.0 tokens/s, first after 0.25 s, stopped at max-new-tokens]\n"


def test_thoughts_can_be_hidden(capsys):
    Terminal(Session(THOUGHT), "x", hide_analysis=True).answer_once("q")
    out, err = capsys.readouterr()
    assert out == "yes!\n" and "hidden" not in err
    Terminal(Session([*THOUGHT[:2], END]), "x", hide_analysis=True).answer_once("q")
    out, err = capsys.readouterr()
    assert out == "\n" and "stopped at max-new-tokens, nothing but hidden thoughts so far]" in err


@pytest.mark.parametrize(("no_color", "dim"), [(None, "\033[2mhm\033[0m"), ("1", "hm")])
def test_thoughts_are_dim_on_a_screen(monkeypatch, no_color, dim):
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    Terminal(Session(THOUGHT), "x").answer_once("q")
    assert screen.getvalue().startswith(dim)
    assert screen.getvalue().endswith("yes!\n")


def test_ctrl_c_stops_an_answer_and_not_the_conversation(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    Terminal(Session([Said("par", "final"), KeyboardInterrupt()], [Said("whole", "final"), END]), "x").converse()
    out, err = capsys.readouterr()
    assert out == "parwhole\n"
    assert "[stopped]" in err


def test_json_keeps_the_channels_apart():
    terminal = Terminal(Session(THOUGHT), "x")
    answer = terminal.answer_as_json("q")
    assert (answer["text"], answer["analysis"], answer["finish_reason"]) == ("yes!", "hmm", "length")
    assert (answer["prompt_tokens"], answer["new_tokens"], answer["tokens_per_second"]) == (3, 5, 4.0)
    assert "commentary" not in answer
