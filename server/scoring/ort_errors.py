"""What onnxruntime raises; apart, so that whoever only tries a file loads nothing else of the scorers."""

from __future__ import annotations

from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

# onnxruntime's exceptions share no base class but Exception; ValueError is its answer to unknown names.
ORT_ERRORS: tuple[type[Exception], ...] = (
    *(getattr(ort_state, name) for name in (
        "EPFail", "EngineError", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "ModelLoaded",
        "NoModel", "NoSuchFile", "NotImplemented", "RuntimeException",
    )),
    RuntimeError,
    ValueError,
)  # fmt: skip
