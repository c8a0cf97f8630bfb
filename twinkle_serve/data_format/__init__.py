"""Inputs and outputs of calls. Numpy only: neither torch nor vllm nor ray is loaded."""

from twinkle_serve.data_format.numpy1 import read_arrays_of_numpy2
from twinkle_serve.data_format.prompts import Input, InputFeature, Message, Trajectory
from twinkle_serve.data_format.response import SampleResponse
from twinkle_serve.data_format.sample_updates import CallBegun, SampleUpdate
from twinkle_serve.data_format.samples import PromptScores, SampleColumns
from twinkle_serve.data_format.sampling_params import SamplingParams
from twinkle_serve.data_format.sequence import SampledSequence
from twinkle_serve.data_format.structured_outputs import StructuredOutputs
from twinkle_serve.data_format.tool_types import FunctionCall, FunctionSpec, Tool, ToolCall
from twinkle_serve.data_format.user_data import pack_value, user_data_get

read_arrays_of_numpy2()

__all__ = [
    "CallBegun",
    "FunctionCall",
    "FunctionSpec",
    "Input",
    "InputFeature",
    "Message",
    "PromptScores",
    "SampleColumns",
    "SampleResponse",
    "SampleUpdate",
    "SampledSequence",
    "SamplingParams",
    "StructuredOutputs",
    "Tool",
    "ToolCall",
    "Trajectory",
    "pack_value",
    "user_data_get",
]
