"""The least of many numbers, found without sorting: radix selection, in Triton.

Floats that are not negative are in the order of their bits read as integers, the keys. Digit by digit, from the top,
a histogram of the keys that begin like the one that is sought tells how that goes on. What is known so far is worked
out by every program for itself, from the histograms: nothing waits for the host.
"""

import triton
import triton.language as tl

DIGITS, BINS = 4, 256  # digits of a key, and what one can be

_BITS, _DIGITS, _BINS = tl.constexpr(8), tl.constexpr(DIGITS), tl.constexpr(BINS)


@triton.jit
def load_keys(values_ptr, size, BLOCK: tl.constexpr):
    """The keys of a program, where they lie, and which of them there are."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    key = tl.load(values_ptr + at, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    return key & 0x7FFFFFFF, at, inside  # -0.0 is 0.0


@triton.jit
def begin(histograms_ptr, count, KNOWN: tl.constexpr):
    """The first ``KNOWN`` digits of the ``count``-th least key, and which one it is of the keys that begin so."""
    first, rank, digit = tl.cast(0, tl.int32), tl.cast(count, tl.int32), tl.arange(0, _BINS)
    for i in tl.static_range(KNOWN):
        found = tl.load(histograms_ptr + i * _BINS + digit)
        upto = tl.cumsum(found, 0)
        here = (upto - found < rank) & (rank <= upto)
        first = first * _BINS + tl.sum(tl.where(here, digit, 0))
        rank -= tl.sum(tl.where(here, upto - found, 0))
    return first, rank


@triton.jit(do_not_specialize=["size", "count"])
def histogram_kernel(values_ptr, histograms_ptr, size, count, KNOWN: tl.constexpr, BLOCK: tl.constexpr):
    """Count the digits behind the first ``KNOWN`` ones, into the histogram of that number; all start at zero."""
    key, _, counted = load_keys(values_ptr, size, BLOCK)
    if KNOWN > 0:
        first, _ = begin(histograms_ptr, count, KNOWN)
        counted = counted & (key >> _BITS * (_DIGITS - KNOWN) == first)
    digit = key >> _BITS * (_DIGITS - 1 - KNOWN) & (_BINS - 1)
    found = tl.histogram(digit, _BINS, mask=counted)
    tl.atomic_add(histograms_ptr + KNOWN * _BINS + tl.arange(0, _BINS), found, mask=found > 0, sem="relaxed")


@triton.jit(do_not_specialize=["size", "count"])
def ties_kernel(values_ptr, histograms_ptr, ties_ptr, size, count, BLOCK: tl.constexpr):
    """Count the keys of every program that are equal to the ``count``-th least one."""
    key, _, inside = load_keys(values_ptr, size, BLOCK)
    least, _ = begin(histograms_ptr, count, _DIGITS)
    tl.store(ties_ptr + tl.program_id(0), tl.sum((inside & (key == least)).to(tl.int32)))


@triton.jit(do_not_specialize=["size", "count"])
def mark_kernel(values_ptr, histograms_ptr, ties_ptr, marked_ptr, size, count, BLOCK: tl.constexpr):
    """Mark the ``count`` least keys, the first ones of equals; ``ties`` are those of a program and all before it."""
    key, at, inside = load_keys(values_ptr, size, BLOCK)
    least, rank = begin(histograms_ptr, count, _DIGITS)
    tie = (inside & (key == least)).to(tl.int32)
    upto = tl.load(ties_ptr + tl.program_id(0)) - tl.sum(tie) + tl.cumsum(tie, 0)
    marked = (key < least) | ((tie != 0) & (upto <= rank))
    tl.store(marked_ptr + at, marked.to(tl.int8), mask=inside)
