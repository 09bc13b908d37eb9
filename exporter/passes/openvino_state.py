"""From cache inputs and outputs to OpenVINO state, as optimum-intel and LLMPipeline expect it."""

from __future__ import annotations

from typing import Any

import numpy as np


def make_stateful(model: Any) -> None:
    """Turn past_key_values.N / present.N into variables that beam_idx reorders.

    Every variable starts as zero rows, or a state of zeros, of the batch at hand: without that initial value
    the plugin cannot know the batch of an empty cache.
    """
    import openvino.opset15 as ops
    from openvino import PartialShape, Type
    from openvino._offline_transformations import apply_make_stateful_transformation

    beam = ops.parameter(PartialShape([-1]), Type.i32, name="beam_idx")
    beam.output(0).set_names({"beam_idx"})
    model.add_parameters([beam])
    pairs = {}
    for past in [p for p in model.get_parameters() if p.get_friendly_name().startswith("past_key_values.")]:
        name = past.get_friendly_name()
        users = list(past.output(0).get_target_inputs())
        chosen = ops.gather(past, beam, ops.constant(np.array(0)))
        for user in users:
            user.replace_source_output(chosen.output(0))
        pairs[name] = name.replace("past_key_values.", "present.")
    apply_make_stateful_transformation(model, pairs)
    _initial_values(model)
    model.validate_nodes_and_infer_types()


def _initial_values(model: Any) -> None:
    import openvino.opset15 as ops

    input_ids = next(p for p in model.get_parameters() if "input_ids" in p.output(0).get_names())
    batch = ops.gather(ops.shape_of(input_ids), ops.constant(np.array([0])), ops.constant(np.array(0)))
    for node in [n for n in model.get_ops() if n.get_type_name() == "ReadValue"]:
        _, *own = node.get_output_partial_shape(0)
        sizes = [0 if dim.is_dynamic else int(dim.get_length()) for dim in own]
        dims = ops.concat([batch, *(ops.constant(np.array([size])) for size in sizes)], 0)
        node.set_arguments([ops.broadcast(ops.constant(np.float32(0)), dims).output(0)])


def stable_topk(model: Any) -> None:
    """Rebuild every TopK with ties to the lowest index; the ONNX front end leaves their order open."""
    import openvino.opset11 as ops

    for node in [n for n in model.get_ops() if n.get_type_name() == "TopK"]:
        attributes = node.get_attributes()
        stable = ops.topk(
            node.input_value(0),
            node.input_value(1),
            attributes["axis"],
            attributes["mode"],
            "value",
            attributes["index_element_type"],
            stable=True,
        )
        for index in range(2):
            for user in list(node.output(index).get_target_inputs()):
                user.replace_source_output(stable.output(index))
