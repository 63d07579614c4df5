"""Triton backend "onnxruntime" for machines without NVIDIA's own: the same config.pbtxt loads on both.

Triton starts this file in a stub process for every model whose configuration says
``platform: "onnxruntime_onnx"``. It loads ``model.onnx`` of the requested version, joins all waiting
requests along the batch axis, runs once and splits the result. Requests of a model with several inputs run one by
one: an input may be the index into another one, or have fewer rows.

A version whose ONNX metadata names another ``feature_schema`` than the configuration does not load:
one config.pbtxt covers all versions of a model, so only the file itself can tell.
"""

from __future__ import annotations

import json
import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

if int(np.__version__.split(".")[0]) >= 2:
    # This Triton passes tensors in NumPy 1's layout; with NumPy 2 they arrive corrupted, without any error.
    raise ImportError(f"the Triton environment needs numpy < 2, found {np.__version__}")

THREADS = max(1, min(2, os.cpu_count() or 1))

# onnxruntime's exceptions share no base class; these are the ones that running a model raises.
_state = onnxruntime.capi.onnxruntime_pybind11_state
RUN_ERRORS = (
    _state.Fail, _state.InvalidArgument, _state.RuntimeException, _state.NotImplemented, _state.EPFail,
    ValueError, RuntimeError,
)  # fmt: skip


class TritonPythonModel:
    """One instance of one model version."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.inter_op_num_threads = 1
        # Waiting threads must not burn the cores that answer requests.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._check_schema(config, path)
        self.inputs = [entry["name"] for entry in config["input"]]
        self.outputs = [entry["name"] for entry in config["output"]]

    def _check_schema(self, config, path):
        built_for = self.session.get_modelmeta().custom_metadata_map.get("feature_schema")
        declared = config.get("parameters", {}).get("feature_schema", {}).get("string_value")
        if built_for and declared and built_for != declared:
            raise pb_utils.TritonModelException(
                f"{path} was built for feature schema {built_for!r}, config.pbtxt says {declared!r}"
            )

    def execute(self, requests):
        """One response per request, in order; a bad request never fails its neighbours."""
        responses = [None] * len(requests)
        groups = {}  # requests whose inputs differ only in the number of rows can share a run
        for position, request in enumerate(requests):
            arrays = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs]
            if any(array.ndim == 0 for array in arrays):
                responses[position] = _error("an input is a scalar: rows wanted")
                continue
            key = tuple(array.shape[1:] for array in arrays) if len(arrays) == 1 else position
            groups.setdefault(key, []).append((position, arrays))
        for members in groups.values():
            for position, response in self._run(members):
                responses[position] = response
        return responses

    def _run(self, members):
        rows = [arrays[0].shape[0] for _, arrays in members]
        if len(members) == 1:
            feeds = dict(zip(self.inputs, members[0][1]))
        else:
            columns = zip(*(arrays for _, arrays in members))
            feeds = {name: np.concatenate(parts) for name, parts in zip(self.inputs, columns)}
        try:
            outputs = self.session.run(self.outputs, feeds)
        except RUN_ERRORS as error:
            if len(members) == 1:
                return [(members[0][0], _error(str(error)))]
            return [answer for member in members for answer in self._run([member])]
        if len(members) == 1:
            return [(members[0][0], self._response(outputs))]
        edges = np.cumsum(rows)[:-1]
        if any(output.shape[:1] != (sum(rows),) for output in outputs):
            return [answer for member in members for answer in self._run([member])]  # cannot be split
        parts = zip(*(np.split(output, edges) for output in outputs))
        return [(position, self._response(part)) for (position, _), part in zip(members, parts)]

    def _response(self, outputs):
        tensors = [pb_utils.Tensor(name, np.ascontiguousarray(o)) for name, o in zip(self.outputs, outputs)]
        return pb_utils.InferenceResponse(output_tensors=tensors)

    def finalize(self):
        self.session = None


def _error(message):
    # INVALID_ARG, not INTERNAL: callers take INTERNAL for a broken process and heal it by reloading.
    error = pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG)
    return pb_utils.InferenceResponse(output_tensors=[], error=error)
