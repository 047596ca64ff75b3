"""CUDA C++ as g++ can read it: launches, shared memory and inline PTX become calls of shim/; all else stays as it is,
line by line."""

import re

LAUNCH = re.compile(r"([\w.]+)<<<(.*?)>>>\(")
SHARED = re.compile(r"(?:alignas\((?P<align>\w+)\)\s+)?(?P<extern>extern\s+)?__shared__\s+(?P<rest>[^;]*);")
DECLARATOR = re.compile(r"(?P<type>.*?)\s*\b(?P<name>\w+)(?P<sizes>(?:\[[^\]]*\])*)", re.S)
ASM = re.compile(r"\basm(?:\s+volatile)?\(\"(?P<code>[^\"]*)\"(?P<operands>[^;]*)\);")
OPERAND = re.compile(r"\"[=+]?\w\"\(([^)]*)\)")


def translated(text):
    return LAUNCH.sub(r"::emulate::Launch(\1, \2)(", ASM.sub(_call, SHARED.sub(_memory, text)))


def _memory(found):
    kind, made = None, []
    for part in _split(found["rest"]):
        declarator = DECLARATOR.fullmatch(part.strip())
        kind = kind or declarator["type"]
        name, sizes = declarator["name"], declarator["sizes"]
        if found["extern"]:
            made.append(f"auto* {name} = static_cast<{kind}*>(::emulate::dynamic_shared());")
        else:
            align = f", {_alignment(found['align'])}" if found["align"] else ""
            made.append(f"auto& {name} = ::emulate::shared<{kind}{sizes}{align}>([] {{}});")
    return " ".join(made)


def _alignment(given):
    return given if given.isdigit() else f"alignof({given})"


def _split(text):
    """At the commas that stand in no brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "<[(") - (c in ">])")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def _call(found):
    """The instruction as a function of its operands, in its own order."""
    if not found["code"]:
        return ";"
    instruction, _, order = found["code"].rstrip("; ").partition(" ")
    operands = OPERAND.findall(found["operands"])
    given = ", ".join(operands[int(i)] for i in re.findall("%([0-9])", order))
    return f"::emulate::{instruction.replace('.', '_')}({given});"
