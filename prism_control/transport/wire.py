"""Raft's messages as protos and back. Entries travel as the bytes that are on disk."""

from prism.raft.v1 import raft_pb2

from prism_control.raft import entry_codec
from prism_control.raft.types import (
    AppendReply,
    AppendRequest,
    Configuration,
    Heartbeat,
    HeartbeatReply,
    Member,
    MemberId,
    Message,
    ReadIndexReply,
    ReadIndexRequest,
    SnapshotMeta,
    TimeoutNow,
    VoteReply,
    VoteRequest,
)


def encode_message(message: Message) -> raft_pb2.RaftMessage:
    """Return the proto of a message. A SnapshotRequest has none: it travels on its own call."""
    term = message.term
    match message:
        case AppendRequest():
            return raft_pb2.RaftMessage(
                term=term,
                append_request=raft_pb2.AppendRequest(
                    previous_index=message.previous_index,
                    previous_term=message.previous_term,
                    entries=[entry_codec.encode(entry) for entry in message.entries],
                    commit=message.commit,
                ),
            )
        case AppendReply():
            return raft_pb2.RaftMessage(
                term=term,
                append_reply=raft_pb2.AppendReply(
                    rejected=message.rejected,
                    index=message.index,
                    hint_index=message.hint_index,
                    hint_term=message.hint_term,
                ),
            )
        case Heartbeat():
            return raft_pb2.RaftMessage(
                term=term,
                heartbeat=raft_pb2.Heartbeat(
                    commit=message.commit, read_context=message.read_context
                ),
            )
        case HeartbeatReply():
            return raft_pb2.RaftMessage(
                term=term,
                heartbeat_reply=raft_pb2.HeartbeatReply(
                    read_context=message.read_context, command_version=message.command_version
                ),
            )
        case VoteRequest():
            return raft_pb2.RaftMessage(
                term=term,
                vote_request=raft_pb2.VoteRequest(
                    pre_vote=message.pre_vote,
                    last_index=message.last_index,
                    last_term=message.last_term,
                    transfer=message.transfer,
                ),
            )
        case VoteReply():
            return raft_pb2.RaftMessage(
                term=term,
                vote_reply=raft_pb2.VoteReply(pre_vote=message.pre_vote, granted=message.granted),
            )
        case ReadIndexRequest():
            return raft_pb2.RaftMessage(
                term=term, read_index_request=raft_pb2.ReadIndexRequest(context=message.context)
            )
        case ReadIndexReply():
            return raft_pb2.RaftMessage(
                term=term,
                read_index_reply=raft_pb2.ReadIndexReply(
                    context=message.context, index=message.index
                ),
            )
        case TimeoutNow():
            return raft_pb2.RaftMessage(term=term, timeout_now=raft_pb2.TimeoutNow())
        case _:
            raise TypeError(f"{type(message).__name__} does not travel on the stream")


def decode_message(
    proto: raft_pb2.RaftMessage, sender: MemberId, receiver: MemberId
) -> Message | None:
    """Return the message that a stream's sender meant; None for a kind unknown to this version.

    Raises:
        CorruptEntryError: An entry's CRC does not fit.
    """
    term = proto.term
    match proto.WhichOneof("message"):
        case "append_request":
            append = proto.append_request
            return AppendRequest(
                sender,
                receiver,
                term,
                append.previous_index,
                append.previous_term,
                tuple(entry_codec.decode(encoded) for encoded in append.entries),
                append.commit,
            )
        case "append_reply":
            reply = proto.append_reply
            return AppendReply(
                sender,
                receiver,
                term,
                reply.rejected,
                reply.index,
                reply.hint_index,
                reply.hint_term,
            )
        case "heartbeat":
            beat = proto.heartbeat
            return Heartbeat(sender, receiver, term, beat.commit, beat.read_context)
        case "heartbeat_reply":
            beaten = proto.heartbeat_reply
            return HeartbeatReply(
                sender, receiver, term, beaten.read_context, beaten.command_version
            )
        case "vote_request":
            vote = proto.vote_request
            return VoteRequest(
                sender,
                receiver,
                term,
                vote.pre_vote,
                vote.last_index,
                vote.last_term,
                vote.transfer,
            )
        case "vote_reply":
            answer = proto.vote_reply
            return VoteReply(sender, receiver, term, answer.pre_vote, answer.granted)
        case "read_index_request":
            return ReadIndexRequest(sender, receiver, term, proto.read_index_request.context)
        case "read_index_reply":
            read = proto.read_index_reply
            return ReadIndexReply(sender, receiver, term, read.context, read.index)
        case "timeout_now":
            return TimeoutNow(sender, receiver, term)
        case _:
            return None


def encode_member(member: Member) -> raft_pb2.Member:
    """Return the proto of a member."""
    return raft_pb2.Member(
        id=member.id,
        name=member.name,
        raft_address=member.raft_address,
        api_address=member.api_address,
    )


def decode_member(proto: raft_pb2.Member) -> Member:
    """Return the member of a proto."""
    return Member(proto.id, proto.name, proto.raft_address, proto.api_address)


def encode_configuration(configuration: Configuration) -> raft_pb2.Configuration:
    """Return the proto of a configuration."""
    return raft_pb2.Configuration(
        voters=configuration.voters,
        voters_outgoing=configuration.voters_outgoing,
        learners=configuration.learners,
        members=[encode_member(member) for member in configuration.members],
    )


def decode_configuration(proto: raft_pb2.Configuration) -> Configuration:
    """Return the configuration of a proto."""
    return Configuration(
        tuple(proto.voters),
        tuple(proto.voters_outgoing),
        tuple(proto.learners),
        tuple(decode_member(member) for member in proto.members),
    )


def encode_snapshot_meta(meta: SnapshotMeta) -> raft_pb2.SnapshotMeta:
    """Return the proto of what a snapshot stands for."""
    return raft_pb2.SnapshotMeta(
        index=meta.index,
        term=meta.term,
        configuration=encode_configuration(meta.configuration),
    )


def decode_snapshot_meta(proto: raft_pb2.SnapshotMeta) -> SnapshotMeta:
    """Return what a snapshot stands for."""
    return SnapshotMeta(proto.index, proto.term, decode_configuration(proto.configuration))
