"""`kernels.wire` on the GPU: the ``streams`` entries of a batch of replies as wire bytes, one fixed stride per reply.

A program writes some entries of one reply, a lane per byte: the bytes before, inside and behind the id are told apart
by their distance from its end, because all else has a fixed width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.aot import Compiled
from kernels.checks_gpu import require_tensor
from kernels.wire import ID_BYTES

ID_WORDS = ID_BYTES // 8
ENTRY_BYTES = 37 + ID_BYTES
"""The longest entry; a reply of n streams takes at most n times this."""
_PLACES = 16
_BYTES = 128  # lanes per entry
_WORDS = tl.constexpr(ID_WORDS)


@triton.jit
def _encode(
    slots_ptr, counts_ptr, scores_ptr, epochs_ptr, verify_by_ptr, sources_ptr, exploration_ptr,
    id_words_ptr, id_lengths_ptr, buffer_ptr, lengths_ptr,
    width, stride,
    WIDTH_PADDED: tl.constexpr, PLACES: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + b)
    first = tl.program_id(1) * PLACES
    every = tl.arange(0, WIDTH_PADDED)
    row = tl.load(slots_ptr + b * width + every, mask=every < count, other=0).to(tl.int64)
    sizes = tl.where(every < count, 37 + tl.load(id_lengths_ptr + row, mask=every < count, other=0).to(tl.int32), 0)
    if first == 0:
        tl.store(lengths_ptr + b, tl.sum(sizes, axis=0))
    place = first + tl.arange(0, PLACES)
    there = place < count
    at = b * width + place
    slot = tl.load(slots_ptr + at, mask=there, other=0).to(tl.int64)
    id_length = tl.load(id_lengths_ptr + slot, mask=there, other=0).to(tl.int32)
    size = tl.where(there, 37 + id_length, 0)
    start = tl.sum(tl.where(every < first, sizes, 0), axis=0) + tl.cumsum(size, axis=0) - size
    score = tl.load(scores_ptr + at, mask=there, other=0.0).to(tl.int32, bitcast=True).to(tl.int64)
    epoch = tl.load(epochs_ptr + slot, mask=there, other=0)
    verify_by = tl.load(verify_by_ptr + slot, mask=there, other=0)
    source = tl.load(sources_ptr + at, mask=there, other=0).to(tl.int64)
    chance = tl.load(exploration_ptr + at, mask=there, other=0.0).to(tl.int32, bitcast=True).to(tl.int64)

    byte = tl.arange(0, BYTES)[None, :]
    length = id_length[:, None]
    written = byte < size[:, None]
    # Within the id: its words are big-endian, with the sign bit turned.
    in_id = (byte >= 4) & (byte < 4 + length)
    word = tl.load(id_words_ptr + slot[:, None] * _WORDS + (byte - 4) // 8, mask=in_id, other=0)
    shift = 56 - 8 * ((byte - 4) % 8)
    value = ((word >> shift.to(tl.int64)) & 0xFF).to(tl.int32) ^ tl.where((byte - 4) % 8 == 0, 0x80, 0)
    # Behind it: tag and little-endian value of score, epoch, verify_by_ms, sources, exploration.
    behind = byte - 4 - length
    tag = tl.where(behind == 0, 0x15, tl.where(behind == 5, 0x19, tl.where(behind == 14, 0x21, 0)))
    tag = tl.where(behind == 23, 0x2D, tl.where(behind == 28, 0x35, tag))
    field = tl.where(behind < 5, score[:, None], tl.where(behind < 14, epoch[:, None], verify_by[:, None]))
    field = tl.where(behind < 23, field, tl.where(behind < 28, source[:, None], chance[:, None]))
    begins = tl.where(behind < 5, 1, tl.where(behind < 14, 6, tl.where(behind < 23, 15, 24)))
    begins = tl.where(behind < 28, begins, 29)
    shift = tl.where((tag == 0) & (behind > 0) & written, 8 * (behind - begins), 0)
    of_field = ((field >> shift.to(tl.int64)) & 0xFF).to(tl.int32)
    value = tl.where(in_id, value, tl.where(tag != 0, tag, of_field))
    # Before it: the entry's tag and length, the id's tag and length.
    head = tl.where(byte == 0, 0x12, tl.where(byte == 1, 35 + length, tl.where(byte == 2, 0x0A, length)))
    value = tl.where(byte < 4, head, value)
    tl.store(buffer_ptr + b * stride + start[:, None] + byte, value.to(tl.uint8), mask=written)


def encode_streams(
    slots: torch.Tensor,
    counts: torch.Tensor,
    scores: torch.Tensor,
    epochs: torch.Tensor,
    verify_by_ms: torch.Tensor,
    sources: torch.Tensor,
    exploration: torch.Tensor,
    id_words: torch.Tensor,
    id_lengths: torch.Tensor,
    *,
    buffer: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """:func:`kernels.wire.encode_streams` into rows: reply b is ``buffer[b, : lengths[b]]``, the same bytes.

    Args:
        slots: int32[B, L], counts: int32[B] in [0, L]; the first counts[b] slots are rows of the table. They come
            from the last check, so they are not checked again.
        scores, exploration: float32[B, L]. sources: int32[B, L], bit set.
        epochs, verify_by_ms: int64[C]. id_lengths: uint8[C], at most 64.
        id_words: int64[C, 8], the zero-padded ids as big-endian words, each XOR 1 << 63.
        buffer: uint8[B, stride], stride at least 101 L; bytes behind a row's length are left as they are.
        lengths: int32[B].

    Raises:
        ValueError: an argument has the wrong dtype, shape, layout or device; the message names it.

    Cost: reads 97 bytes and writes 37 + id length per stream: 2 MB at B = 256, L = 50, under 1 µs at 3 TB/s;
    launch and two dependent reads make it about 3 µs.
    """
    batch, width = slots.shape
    device = slots.device
    require_tensor("slots", slots, torch.int32, (None, None), device)
    require_tensor("counts", counts, torch.int32, (batch,), device)
    require_tensor("scores", scores, torch.float32, (batch, width), device)
    require_tensor("epochs", epochs, torch.int64, (None,), device)
    require_tensor("verify_by_ms", verify_by_ms, torch.int64, epochs.shape, device)
    require_tensor("sources", sources, torch.int32, (batch, width), device)
    require_tensor("exploration", exploration, torch.float32, (batch, width), device)
    require_tensor("id_words", id_words, torch.int64, (epochs.shape[0], ID_WORDS), device)
    require_tensor("id_lengths", id_lengths, torch.uint8, epochs.shape, device)
    require_tensor("buffer", buffer, torch.uint8, (batch, None), device)
    require_tensor("lengths", lengths, torch.int32, (batch,), device)
    if buffer.shape[1] < width * ENTRY_BYTES:
        raise ValueError(
            f"buffer: a stride of at least {width * ENTRY_BYTES} bytes is wanted ({ENTRY_BYTES} for each of "
            f"{width} streams), got {buffer.shape[1]}"
        )
    if batch == 0:
        return
    _encode[(batch, max(1, triton.cdiv(width, _PLACES)))](
        slots, counts, scores, epochs, verify_by_ms, sources, exploration, id_words, id_lengths, buffer, lengths,
        width, buffer.shape[1],
        WIDTH_PADDED=triton.next_power_of_2(max(1, width)), PLACES=_PLACES, BYTES=_BYTES,
    )  # fmt: skip


AOT = [
    Compiled(
        _encode,
        "*i32 *i32 *fp32 *i64 *i64 *i32 *fp32 *i64 *u8 *u8 *i32 i32 i32",
        {"WIDTH_PADDED": 128, "PLACES": _PLACES, "BYTES": _BYTES},
    )
]
