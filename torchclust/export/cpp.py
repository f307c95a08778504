"""The C++ of a board kit: the model and its test vectors as arrays, the operators, a `main`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Template

import numpy as np

from torchclust.export.graph import Array
from torchclust.export.inspect import Port

_CTYPES = {"int8": "std::int8_t", "uint8": "std::uint8_t", "int16": "std::int16_t",
           "int32": "std::int32_t", "int64": "std::int64_t", "bool": "bool"}  # fmt: skip
_PER_LINE = 20


@dataclass(frozen=True)
class Board:
    """All that the C++ files say.

    Attributes:
        source: the .tflite file's name.
        content: what goes into flash.
        inputs, outputs: of the model.
        registrations: {operator: method of MicroMutableOpResolver}.
        arena: bytes.
        arena_note: where that number comes from.
        labels: of the classes; may be empty.
        vectors: inputs, and the outputs that they give.
    """

    source: str
    content: bytes
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    registrations: Mapping[str, str]
    arena: int
    arena_note: str
    labels: tuple[str, ...]
    vectors: tuple[tuple[Sequence[Array], Sequence[Array]], ...]


def files(board: Board) -> dict[str, str]:
    """File name -> text."""
    labels = ", ".join(map(_string, board.labels))
    adds = (f"  TF_LITE_ENSURE_STATUS(to.{add}());" for add in board.registrations.values())
    is_labelled = len(board.labels) == math.prod(board.outputs[0].shape)
    fields = {
        "source": board.source,
        "size": len(board.content),
        "bytes": _rows(np.frombuffer(board.content, np.uint8)),
        "arena": board.arena,
        "arena_note": board.arena_note,
        "ports": "\n".join([_ports("Input", board.inputs), _ports("Output", board.outputs)]),
        "labels": f"constexpr const char* kLabels[] = {{{labels}}};\n" if labels else "",
        "operators": len(board.registrations),
        "adds": "\n".join(adds),
        "vectors": len(board.vectors),
        "test_inputs": _tests("Input", board.inputs, [inputs for inputs, _ in board.vectors]),
        "test_outputs": _tests("Output", board.outputs, [outputs for _, outputs in board.vectors]),
        "set": "\n".join(map(_set, range(len(board.inputs)))),
        "compare": "\n".join(map(_compare, range(len(board.outputs)))),
        "code": _QUANTIZED if board.inputs[0].scale else "static_cast<model::Input0>(reading[i])",
        "format": "%s %g" if is_labelled else "%u %g",
        "name": "model::kLabels[i]" if is_labelled else "static_cast<unsigned>(i)",
    }
    return {name: Template(text).substitute(fields) for name, text in _TEMPLATES.items()}


def _ports(kind: str, ports: Sequence[Port]) -> str:
    lines = [f"constexpr int k{kind}Count = {len(ports)};"]
    for number, p in enumerate(ports):
        shape = ", ".join(map(str, p.shape))
        size = f"{math.prod(p.shape)}, {len(p.shape)}, {{{shape}}}"
        lines += [
            f"using {kind}{number} = {_CTYPES[p.dtype]};",
            f"constexpr Port k{kind}{number} = "
            f"{{{_string(p.name)}, {size}, {_float(p.scale)}, {p.zero_point}}};",
        ]
    return "\n".join(lines)


def _tests(kind: str, ports: Sequence[Port], values: Sequence[Sequence[Array]]) -> str:
    lines = []
    for number, p in enumerate(ports):
        dimensions = f"[kVectors][{math.prod(p.shape)}]"
        lines += [f"const {kind}{number} kTest{kind}{number}{dimensions} = {{"]
        lines += [f"    {{\n{_rows(value[number])}\n    }}," for value in values]
        lines += ["};"]
    return "\n".join(lines)


def _set(number: int) -> str:
    kind = f"model::Input{number}"
    to = "in" if number == 0 else f"interpreter.typed_input_tensor<{kind}>({number})"
    return f"    std::copy_n(model::kTestInput{number}[v], model::kInput{number}.size, {to});"


def _compare(number: int) -> str:
    kind = f"model::Output{number}"
    got = "out" if number == 0 else f"interpreter.typed_output_tensor<{kind}>({number})"
    return (
        f"    for (std::size_t i = 0; i < model::kOutput{number}.size; ++i)\n"
        f"      wrong += {got}[i] != model::kTestOutput{number}[v][i];"
    )


def _rows(values: Array) -> str:
    flat = values.reshape(-1).tolist()
    lines = (flat[start : start + _PER_LINE] for start in range(0, len(flat), _PER_LINE))
    return "\n".join("    " + ", ".join(str(int(v)) for v in line) + "," for line in lines)


def _float(value: float) -> str:
    text = f"{float(np.float32(value)):.9g}"
    return text + ("f" if "." in text or "e" in text else ".0f")


def _string(text: str) -> str:
    """A literal in which all but plain characters are octal escapes of their UTF-8."""
    special = b'"\\?'
    plain = (chr(b) if 32 <= b < 127 and b not in special else f"\\{b:03o}" for b in text.encode())
    return '"' + "".join(plain) + '"'


_QUANTIZED = "Quantized(reading[i])"
_MODEL_HEADER = """\
// $source for tflite-micro: what goes in, what comes out, the memory it needs.
#ifndef MODEL_H_
#define MODEL_H_

#include <cstddef>
#include <cstdint>

// The linker's section for the model, if it needs a name of its own:
//   -DMODEL_SECTION='__attribute__((section(".model")))'
#ifndef MODEL_SECTION
#define MODEL_SECTION
#endif

namespace model {

constexpr std::size_t kDataSize = $size;
extern const unsigned char kData[kDataSize];

// $arena_note
constexpr std::size_t kArenaSize = $arena;

// real value = scale * (code - zero_point)
struct Port {
  const char* name;
  std::size_t size;
  int dimensions;
  int shape[6];
  float scale;
  int zero_point;
};
$ports
$labels
}  // namespace model

#endif  // MODEL_H_
"""
_MODEL_SOURCE = """\
#include "model.h"

namespace model {

// Flatbuffers are read in place, and an Ethos-U reads from multiples of 16 bytes only.
alignas(16) MODEL_SECTION const unsigned char kData[kDataSize] = {
$bytes
};

}  // namespace model
"""
_OPERATORS = """\
// The operators of this model and no others: the linker leaves out all other kernels.
#ifndef OPERATORS_H_
#define OPERATORS_H_

#include "tensorflow/lite/micro/micro_mutable_op_resolver.h"

namespace model {

using Operators = tflite::MicroMutableOpResolver<$operators>;

inline TfLiteStatus Register(Operators& to) {
$adds
  return kTfLiteOk;
}

}  // namespace model

#endif  // OPERATORS_H_
"""
_TEST_VECTORS = """\
// Inputs, and the outputs that tflite-micro's reference kernels give, to the bit.
#ifndef TEST_VECTORS_H_
#define TEST_VECTORS_H_

#include "model.h"

namespace model {

constexpr int kVectors = $vectors;
$test_inputs
$test_outputs

}  // namespace model

#endif  // TEST_VECTORS_H_
"""
_MAIN = """\
// Quantizes a reading, runs the model and prints what comes out. Built with -DSELF_TEST it runs the
// test vectors instead, and says how many values differ.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "model.h"
#include "operators.h"
#include "tensorflow/lite/micro/micro_interpreter.h"
#include "tensorflow/lite/schema/schema_generated.h"
#include "test_vectors.h"

alignas(16) static std::uint8_t arena[model::kArenaSize];

[[maybe_unused]] static model::Input0 Quantized(float value) {
  using Limits = std::numeric_limits<model::Input0>;
  const float code = std::round(value / model::kInput0.scale) + model::kInput0.zero_point;
  return static_cast<model::Input0>(
      std::min<float>(std::max<float>(code, Limits::min()), Limits::max()));
}

int main() {
  model::Operators operators;
  if (model::Register(operators) != kTfLiteOk) return 1;
  const tflite::Model* data = tflite::GetModel(model::kData);
  tflite::MicroInterpreter interpreter(data, operators, arena, sizeof(arena));
  if (interpreter.AllocateTensors() != kTfLiteOk) return 2;  // here kArenaSize is too small
  model::Input0* in = interpreter.typed_input_tensor<model::Input0>(0);
  const model::Output0* out = interpreter.typed_output_tensor<model::Output0>(0);
#ifdef SELF_TEST
  int wrong = 0;
  for (int v = 0; v < model::kVectors; ++v) {
$set
    if (interpreter.Invoke() != kTfLiteOk) return 3;
$compare
  }
  std::printf("%d values differ\\n", wrong);
  return wrong != 0;
#else
  static float reading[model::kInput0.size];  // yours, in the units that the model was trained on
  for (std::size_t i = 0; i < model::kInput0.size; ++i) in[i] = $code;
  if (interpreter.Invoke() != kTfLiteOk) return 3;
  const double scale = model::kOutput0.scale;
  for (std::size_t i = 0; i < model::kOutput0.size; ++i)
    std::printf("$format\\n", $name, scale * (out[i] - model::kOutput0.zero_point));
  const unsigned used = static_cast<unsigned>(interpreter.arena_used_bytes());
  std::printf("arena: %u of %u bytes\\n", used, static_cast<unsigned>(sizeof(arena)));
#endif
}
"""
_TEMPLATES = {
    "model.h": _MODEL_HEADER,
    "model.cc": _MODEL_SOURCE,
    "operators.h": _OPERATORS,
    "test_vectors.h": _TEST_VECTORS,
    "main.cc": _MAIN,
}
