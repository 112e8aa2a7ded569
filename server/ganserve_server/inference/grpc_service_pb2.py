"""The messages of proto/inference/grpc_service.proto, by `make stubs`.

Protobuf refuses two definitions of a name in one pool, and Triton's client brings its own of `inference.*`. These
have a pool for themselves, so that one program can use both.
"""

from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_files = descriptor_pb2.FileDescriptorSet.FromString(Path(__file__).with_name("grpc_service.binpb").read_bytes())
DESCRIPTOR = descriptor_pool.DescriptorPool().AddSerializedFile(_files.file[0].SerializeToString())
globals().update(
    {name: message_factory.GetMessageClass(message) for name, message in DESCRIPTOR.message_types_by_name.items()}
)
