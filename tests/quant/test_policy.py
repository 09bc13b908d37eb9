from __future__ import annotations

import pytest

from cpm_edge.quant import Policy, QuantError, Scheme, TensorClass, WeightFormat

INT4, INT8, FP16 = WeightFormat.INT4, WeightFormat.INT8, WeightFormat.FP16
ROW = Scheme(INT8)


def test_int4_keeps_embedding_and_head_in_int8_rows() -> None:
    policy = Policy.for_format(INT4)
    assert policy == Policy(linear=Scheme(INT4, 32), embedding=ROW, head=ROW)
    assert policy.scheme_for(TensorClass.LINEAR, 1024) == (Scheme(INT4, 32), None)
    assert policy.scheme_for(TensorClass.EMBEDDING, 577) == (ROW, None)
    assert policy.scheme_for(TensorClass.ABSORBED, 256) == (ROW, None)
    assert policy.scheme_for(TensorClass.NORM, 1024) == (Scheme(WeightFormat.FP32), None)
    assert policy.scheme_for(TensorClass.OTHER, 1024) == (Scheme(WeightFormat.FP32), None)


@pytest.mark.parametrize("weight_format", [WeightFormat.FP32, FP16, WeightFormat.BF16, INT8])
def test_other_formats_hold_for_every_matrix(weight_format: WeightFormat) -> None:
    scheme = Scheme(weight_format)
    policy = Policy.for_format(weight_format)
    assert policy == Policy(linear=scheme, embedding=scheme, head=scheme)
    assert policy.scheme_for(TensorClass.ABSORBED, 64) == (scheme, None)
    assert policy.scheme_for(TensorClass.NORM, 64)[0].format is WeightFormat.FP32
    other = policy.scheme_for(TensorClass.OTHER, 64)[0].format
    assert other is (WeightFormat.FP32 if weight_format is INT8 else weight_format)


def test_a_group_that_does_not_divide_falls_with_a_note() -> None:
    policy = Policy.for_format(INT4, 128, symmetric=False)
    scheme, note = policy.scheme_for(TensorClass.LINEAR, 576)
    assert scheme == Scheme(INT4, 64, symmetric=False)
    assert note == "576 columns: group 128 -> 64"
    with pytest.raises(QuantError, match="100 columns"):
        policy.scheme_for(TensorClass.LINEAR, 100)


def test_overrides() -> None:
    policy = Policy.for_format(INT4, 32, embedding=FP16, head=INT4)
    assert (policy.embedding, policy.head) == (Scheme(FP16), Scheme(INT4, 32))


def test_tied_embedding_and_head_share_one_scheme() -> None:
    for policy in (
        Policy.for_format(INT4, embedding=FP16, tied=True),
        Policy.for_format(INT4, head=FP16, tied=True),
        Policy.for_format(INT4, head=FP16, embedding=FP16, tied=True),
    ):
        assert policy.embedding == policy.head == Scheme(FP16)
    assert Policy.for_format(INT4, tied=True).head == ROW
    with pytest.raises(QuantError, match="fp16 for the embedding and int8 for the head"):
        Policy.for_format(INT4, embedding=FP16, head=INT8, tied=True)


def test_settings_that_would_be_ignored_are_refused() -> None:
    with pytest.raises(QuantError, match="group size 64 applies to int4"):
        Policy.for_format(INT8, 64)
    with pytest.raises(QuantError, match="asymmetric applies to int4"):
        Policy.for_format(FP16, symmetric=False)
    with pytest.raises(QuantError, match="expected one of 32, 64, 128, got 48"):
        Policy.for_format(INT4, 48)
    assert Policy.for_format(INT8, 64, head=INT4).head == Scheme(INT4, 64)
