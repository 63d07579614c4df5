"""The way of a batch of requests on the GPU: the stages of `Pipeline`, queued at once, read back with one copy.

The host prepares (filters of the tick, followed creators, one upload), the device does the rest without being asked
back: search → merge → blend → select → verify → encode. On a GPU the queue of a bucket is captured once as a CUDA
graph and replayed. `start` returns while the device works; `finish` waits for the copy and checks again on the host
if anything changed meanwhile, so that no reply is older than the newest table.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kernels.backend import Backend
from kernels.blend_gpu import blend
from kernels.merge_gpu import merge_candidates
from kernels.slate import Outcome
from kernels.slate_gpu import select_slates
from kernels.topk_gpu import masked_topk
from kernels.verify import Drop, verify_picks
from kernels.verify_gpu import verify_picks as verify_on_device
from kernels.wire_gpu import encode_streams
from server.clock import Clock
from server.config import Settings
from server.live.device import DeviceTable
from server.ranking.device_batch import BUCKETS, RankBuffers, Widths, fits
from server.ranking.device_views import DeviceViews
from server.ranking.pipeline import Pipeline
from server.ranking.slates import SlateBatch, StageTimes, Tally
from server.ranking.tally import tally_of
from server.retrieval.query import QueryBatch
from server.retrieval.sources import SOURCES, Batch, bit_of, followed
from server.retrieval.view import Snapshot
