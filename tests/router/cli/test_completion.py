"""Completion scripts, asked as the shells ask them."""

import shutil
import subprocess

import pytest

from router.cli import main as cli
from router.cli.completion import SCRIPTS, places

TIMEOUT_S = 30
ASKED = [
    ("se", ["search", "serve", "service"]),
    ("serve --log-level de", ["debug"]),
    ("serve --mod", ["--model-path"]),
    ("config ", ["check", "show"]),
    ("config show --ch", ["--changed"]),
    ("completion z", ["zsh"]),
]


def script(shell: str) -> str:
    return SCRIPTS[shell](list(places(cli.build_parser())))


def offered(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def test_every_verb_is_there() -> None:
    known = {place.name for place in places(cli.build_parser())}
    assert {"mlxspec", "mlxspec serve", "mlxspec config", "mlxspec config check", "mlxspec completion"} <= known


@pytest.mark.parametrize("shell", SCRIPTS)
def test_script_is_printed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    assert capsys.readouterr().out == script(shell)


@pytest.mark.parametrize(("line", "expected"), ASKED)
def test_bash_offers_what_fits(line: str, expected: list[str]) -> None:
    ask = f"""{script("bash")}
        line="mlxspec {line}"; COMP_WORDS=($line); [[ $line == *" " ]] && COMP_WORDS+=("")
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _mlxspec; printf '%s\\n' "${{COMPREPLY[@]}}" """
    words = offered(["bash", "--norc", "-c", ask]).split()
    is_option = line.split()[-1].startswith("-")
    assert sorted(word for word in words if is_option or not word.startswith("-")) == expected


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize(("line", "expected"), ASKED)
def test_fish_offers_what_fits(line: str, expected: list[str]) -> None:
    found = offered(["fish", "--no-config", "-c", f"{script('fish')}\ncomplete -C 'mlxspec {line}'"])
    assert sorted(row.partition("\t")[0] for row in found.splitlines()) == expected


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_can_read_it() -> None:
    offered(["zsh", "-f", "-n", "-c", script("zsh")])


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize(("line", "expected"), ASKED)
def test_zsh_offers_what_fits(line: str, expected: list[str]) -> None:
    # Outside an editing shell the builtins of completion only fail, so these stand-ins print what they are given.
    stand_ins = """
        compdef() { :; }
        _files() { :; }
        compadd() { shift; print -l -- "$@"; }
        _describe() { print -l -- "${(@P)@[-1]}"; }"""
    *before, last = f"mlxspec {line}".split(" ")
    words = " ".join(f"'{word}'" for word in [*before, last])
    ask = f"{stand_ins}\n{script('zsh')}\nPREFIX='{last}' CURRENT={len(before) + 1} words=({words}); _mlxspec"
    names = [row.partition(":")[0] for row in offered(["zsh", "-f", "-c", ask]).splitlines()]
    assert sorted(name for name in names if name.startswith(last)) == expected
