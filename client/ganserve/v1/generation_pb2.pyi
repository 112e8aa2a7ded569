from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_INTERACTIVE: _ClassVar[Priority]
    PRIORITY_BULK: _ClassVar[Priority]

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENCODING_UNSPECIFIED: _ClassVar[Encoding]
    ENCODING_RAW: _ClassVar[Encoding]
    ENCODING_PNG: _ClassVar[Encoding]
    ENCODING_JPEG: _ClassVar[Encoding]
    ENCODING_WEBP: _ClassVar[Encoding]

class Layout(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LAYOUT_UNSPECIFIED: _ClassVar[Layout]
    LAYOUT_ONE_EACH: _ClassVar[Layout]
    LAYOUT_CONTACT_SHEET: _ClassVar[Layout]

class TruncationEffect(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRUNCATION_EFFECT_UNSPECIFIED: _ClassVar[TruncationEffect]
    TRUNCATION_EFFECT_LATENT: _ClassVar[TruncationEffect]
    TRUNCATION_EFFECT_INPUT: _ClassVar[TruncationEffect]
    TRUNCATION_EFFECT_NONE: _ClassVar[TruncationEffect]

class Distribution(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DISTRIBUTION_UNSPECIFIED: _ClassVar[Distribution]
    DISTRIBUTION_NORMAL: _ClassVar[Distribution]
    DISTRIBUTION_UNIFORM: _ClassVar[Distribution]
    DISTRIBUTION_SPHERE: _ClassVar[Distribution]
    DISTRIBUTION_TRUNCATED_NORMAL: _ClassVar[Distribution]
PRIORITY_UNSPECIFIED: Priority
PRIORITY_INTERACTIVE: Priority
PRIORITY_BULK: Priority
ENCODING_UNSPECIFIED: Encoding
ENCODING_RAW: Encoding
ENCODING_PNG: Encoding
ENCODING_JPEG: Encoding
ENCODING_WEBP: Encoding
LAYOUT_UNSPECIFIED: Layout
LAYOUT_ONE_EACH: Layout
LAYOUT_CONTACT_SHEET: Layout
TRUNCATION_EFFECT_UNSPECIFIED: TruncationEffect
TRUNCATION_EFFECT_LATENT: TruncationEffect
TRUNCATION_EFFECT_INPUT: TruncationEffect
TRUNCATION_EFFECT_NONE: TruncationEffect
DISTRIBUTION_UNSPECIFIED: Distribution
DISTRIBUTION_NORMAL: Distribution
DISTRIBUTION_UNIFORM: Distribution
DISTRIBUTION_SPHERE: Distribution
DISTRIBUTION_TRUNCATED_NORMAL: Distribution

class GenerateImagesRequest(_message.Message):
    __slots__ = ("model", "version", "count", "seed", "latents", "labels", "label_names", "truncation", "encoding", "layout", "omit_identity", "priority", "inputs")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    LABEL_NAMES_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    OMIT_IDENTITY_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    count: int
    seed: int
    latents: Latents
    labels: _containers.RepeatedScalarFieldContainer[int]
    label_names: _containers.RepeatedScalarFieldContainer[str]
    truncation: float
    encoding: Encoding
    layout: Layout
    omit_identity: bool
    priority: Priority
    inputs: InputValues
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ..., count: _Optional[int] = ..., seed: _Optional[int] = ..., latents: _Optional[_Union[Latents, _Mapping]] = ..., labels: _Optional[_Iterable[int]] = ..., label_names: _Optional[_Iterable[str]] = ..., truncation: _Optional[float] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., layout: _Optional[_Union[Layout, str]] = ..., omit_identity: bool = ..., priority: _Optional[_Union[Priority, str]] = ..., inputs: _Optional[_Union[InputValues, _Mapping]] = ...) -> None: ...

class InputValues(_message.Message):
    __slots__ = ("attributes", "seeds")
    class SeedsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    attributes: _containers.RepeatedCompositeFieldContainer[AttributeValues]
    seeds: _containers.ScalarMap[str, int]
    def __init__(self, attributes: _Optional[_Iterable[_Union[AttributeValues, _Mapping]]] = ..., seeds: _Optional[_Mapping[str, int]] = ...) -> None: ...

class AttributeValues(_message.Message):
    __slots__ = ("name", "values")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    name: str
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, name: _Optional[str] = ..., values: _Optional[_Iterable[float]] = ...) -> None: ...

class Latents(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class GenerateImagesResponse(_message.Message):
    __slots__ = ("model", "version", "digest", "provider", "count", "height", "width", "channels", "truncation", "seeds", "labels", "encoding", "pixels", "files", "queue_time", "compute_time", "inputs")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TIME_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_TIME_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    digest: str
    provider: str
    count: int
    height: int
    width: int
    channels: int
    truncation: float
    seeds: _containers.RepeatedScalarFieldContainer[int]
    labels: _containers.RepeatedScalarFieldContainer[int]
    encoding: Encoding
    pixels: bytes
    files: _containers.RepeatedScalarFieldContainer[bytes]
    queue_time: _duration_pb2.Duration
    compute_time: _duration_pb2.Duration
    inputs: InputValues
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., provider: _Optional[str] = ..., count: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., channels: _Optional[int] = ..., truncation: _Optional[float] = ..., seeds: _Optional[_Iterable[int]] = ..., labels: _Optional[_Iterable[int]] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., pixels: _Optional[bytes] = ..., files: _Optional[_Iterable[bytes]] = ..., queue_time: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., compute_time: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., inputs: _Optional[_Union[InputValues, _Mapping]] = ...) -> None: ...

class StreamImagesRequest(_message.Message):
    __slots__ = ("generate",)
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    generate: GenerateImagesRequest
    def __init__(self, generate: _Optional[_Union[GenerateImagesRequest, _Mapping]] = ...) -> None: ...

class StreamImagesResponse(_message.Message):
    __slots__ = ("chunk",)
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunk: GenerateImagesResponse
    def __init__(self, chunk: _Optional[_Union[GenerateImagesResponse, _Mapping]] = ...) -> None: ...

class GenerateEachRequest(_message.Message):
    __slots__ = ("generate",)
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    generate: GenerateImagesRequest
    def __init__(self, generate: _Optional[_Union[GenerateImagesRequest, _Mapping]] = ...) -> None: ...

class GenerateEachResponse(_message.Message):
    __slots__ = ("response", "error")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    response: GenerateImagesResponse
    error: Error
    def __init__(self, response: _Optional[_Union[GenerateImagesResponse, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "reason", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: str
    message: str
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ("page_token",)
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_token: str
    def __init__(self, page_token: _Optional[str] = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "next_page_token")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    next_page_token: str
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: Model
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "version", "versions", "digest", "provider", "card", "truncation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    CARD_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    versions: _containers.RepeatedScalarFieldContainer[int]
    digest: str
    provider: str
    card: ModelCard
    truncation: TruncationEffect
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., versions: _Optional[_Iterable[int]] = ..., digest: _Optional[str] = ..., provider: _Optional[str] = ..., card: _Optional[_Union[ModelCard, _Mapping]] = ..., truncation: _Optional[_Union[TruncationEffect, str]] = ...) -> None: ...

class ModelCard(_message.Message):
    __slots__ = ("architecture", "dataset", "latent_dim", "height", "width", "channels", "class_names", "generator_parameters", "training", "metrics", "golden_images", "created_at", "trainer_version", "precision", "inputs")
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    LATENT_DIM_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAMES_FIELD_NUMBER: _ClassVar[int]
    GENERATOR_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    GOLDEN_IMAGES_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    TRAINER_VERSION_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    architecture: str
    dataset: str
    latent_dim: int
    height: int
    width: int
    channels: int
    class_names: _containers.RepeatedScalarFieldContainer[str]
    generator_parameters: int
    training: Training
    metrics: _containers.RepeatedCompositeFieldContainer[QualityMetric]
    golden_images: _containers.RepeatedCompositeFieldContainer[GoldenImage]
    created_at: _timestamp_pb2.Timestamp
    trainer_version: str
    precision: str
    inputs: _containers.RepeatedCompositeFieldContainer[ModelInput]
    def __init__(self, architecture: _Optional[str] = ..., dataset: _Optional[str] = ..., latent_dim: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., channels: _Optional[int] = ..., class_names: _Optional[_Iterable[str]] = ..., generator_parameters: _Optional[int] = ..., training: _Optional[_Union[Training, _Mapping]] = ..., metrics: _Optional[_Iterable[_Union[QualityMetric, _Mapping]]] = ..., golden_images: _Optional[_Iterable[_Union[GoldenImage, _Mapping]]] = ..., created_at: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., trainer_version: _Optional[str] = ..., precision: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[ModelInput, _Mapping]]] = ...) -> None: ...

class ModelInput(_message.Message):
    __slots__ = ("name", "latent", "label", "attributes", "truncation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LATENT_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    latent: LatentInput
    label: LabelInput
    attributes: AttributesInput
    truncation: TruncationInput
    def __init__(self, name: _Optional[str] = ..., latent: _Optional[_Union[LatentInput, _Mapping]] = ..., label: _Optional[_Union[LabelInput, _Mapping]] = ..., attributes: _Optional[_Union[AttributesInput, _Mapping]] = ..., truncation: _Optional[_Union[TruncationInput, _Mapping]] = ...) -> None: ...

class LatentInput(_message.Message):
    __slots__ = ("shape", "distribution", "default_seed")
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DISTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_SEED_FIELD_NUMBER: _ClassVar[int]
    shape: _containers.RepeatedScalarFieldContainer[int]
    distribution: Distribution
    default_seed: int
    def __init__(self, shape: _Optional[_Iterable[int]] = ..., distribution: _Optional[_Union[Distribution, str]] = ..., default_seed: _Optional[int] = ...) -> None: ...

class LabelInput(_message.Message):
    __slots__ = ("one_hot",)
    ONE_HOT_FIELD_NUMBER: _ClassVar[int]
    one_hot: bool
    def __init__(self, one_hot: bool = ...) -> None: ...

class AttributesInput(_message.Message):
    __slots__ = ("attributes",)
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    attributes: _containers.RepeatedCompositeFieldContainer[Attribute]
    def __init__(self, attributes: _Optional[_Iterable[_Union[Attribute, _Mapping]]] = ...) -> None: ...

class Attribute(_message.Message):
    __slots__ = ("name", "minimum", "maximum", "default_value", "binary")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_FIELD_NUMBER: _ClassVar[int]
    MAXIMUM_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_VALUE_FIELD_NUMBER: _ClassVar[int]
    BINARY_FIELD_NUMBER: _ClassVar[int]
    name: str
    minimum: float
    maximum: float
    default_value: float
    binary: bool
    def __init__(self, name: _Optional[str] = ..., minimum: _Optional[float] = ..., maximum: _Optional[float] = ..., default_value: _Optional[float] = ..., binary: bool = ...) -> None: ...

class TruncationInput(_message.Message):
    __slots__ = ("scalar",)
    SCALAR_FIELD_NUMBER: _ClassVar[int]
    scalar: bool
    def __init__(self, scalar: bool = ...) -> None: ...

class Training(_message.Message):
    __slots__ = ("images_seen", "duration", "device", "configuration")
    class ConfigurationEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    IMAGES_SEEN_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CONFIGURATION_FIELD_NUMBER: _ClassVar[int]
    images_seen: int
    duration: _duration_pb2.Duration
    device: str
    configuration: _containers.ScalarMap[str, str]
    def __init__(self, images_seen: _Optional[int] = ..., duration: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., device: _Optional[str] = ..., configuration: _Optional[_Mapping[str, str]] = ...) -> None: ...

class QualityMetric(_message.Message):
    __slots__ = ("name", "value", "method", "standard_error")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    STANDARD_ERROR_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    method: str
    standard_error: float
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ..., method: _Optional[str] = ..., standard_error: _Optional[float] = ...) -> None: ...

class GoldenImage(_message.Message):
    __slots__ = ("seed", "label", "digest", "png")
    SEED_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PNG_FIELD_NUMBER: _ClassVar[int]
    seed: int
    label: int
    digest: str
    png: bytes
    def __init__(self, seed: _Optional[int] = ..., label: _Optional[int] = ..., digest: _Optional[str] = ..., png: _Optional[bytes] = ...) -> None: ...
