"""NBD on the wire (NetworkBlockDevice, doc/proto.md): fixed newstyle negotiation, simple and structured replies."""

from __future__ import annotations

from construct import Bytes, Const, Int16ub, Int32ub, Int64ub, Struct, this

DEFAULT_PORT = 10809
MAX_REQUEST = 32 << 20

GREETING = Struct("magic" / Const(b"NBDMAGIC"), "style" / Const(b"IHAVEOPT"), "flags" / Int16ub)
FIXED_NEWSTYLE, NO_ZEROES = 1, 2  # both in the server's and the client's flags
CLIENT_FLAGS = Int32ub

OPTION = Struct("magic" / Const(b"IHAVEOPT"), "option" / Int32ub, "length" / Int32ub)
OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_INFO, OPT_GO = 1, 2, 3, 6, 7
OPT_STRUCTURED_REPLY, OPT_LIST_META, OPT_SET_META = 8, 9, 10

OPTION_REPLY = Struct(
    "magic" / Const(b"\x00\x03\xe8\x89\x04\x55\x65\xa9"), "option" / Int32ub, "type" / Int32ub, "length" / Int32ub
)
REP_ACK, REP_SERVER, REP_INFO, REP_META = 1, 2, 3, 4
REP_ERROR = 1 << 31
REP_ERR_UNSUP, REP_ERR_INVALID, REP_ERR_UNKNOWN = REP_ERROR | 1, REP_ERROR | 3, REP_ERROR | 6

NAME = Struct("length" / Int32ub, "name" / Bytes(this.length))
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3
EXPORT_INFO = Struct("type" / Int16ub, "size" / Int64ub, "flags" / Int16ub)
BLOCK_INFO = Struct("type" / Int16ub, "minimum" / Int32ub, "preferred" / Int32ub, "maximum" / Int32ub)
EXPORT_NAME_REPLY = Struct("size" / Int64ub, "flags" / Int16ub)

HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_TRIM, SEND_WRITE_ZEROES, CAN_MULTI_CONN = 1, 2, 4, 32, 64, 256

REQUEST = Struct(
    "magic" / Const(b"\x25\x60\x95\x13"),
    "flags" / Int16ub,
    "type" / Int16ub,
    "cookie" / Int64ub,
    "offset" / Int64ub,
    "length" / Int32ub,
)
CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS = 0, 1, 2, 3, 4, 6, 7
REQ_ONE = 8  # block status: one extent is enough

SIMPLE_REPLY = Struct("magic" / Const(b"\x67\x44\x66\x98"), "error" / Int32ub, "cookie" / Int64ub)
CHUNK = Struct(
    "magic" / Const(b"\x66\x8e\x33\xef"), "flags" / Int16ub, "type" / Int16ub, "cookie" / Int64ub, "length" / Int32ub
)
REPLY_DONE = 1
CHUNK_NONE, CHUNK_DATA, CHUNK_HOLE, CHUNK_STATUS = 0, 1, 2, 5
CHUNK_ERROR = 1 << 15
HOLE_CHUNK = Struct("offset" / Int64ub, "length" / Int32ub)
STATUS = [("length", ">u4"), ("flags", ">u4")]  # a descriptor of block status, as a table row
STATE_HOLE, STATE_ZERO = 1, 2
ALLOCATION = b"base:allocation"

EPERM, EIO, EINVAL, ESHUTDOWN = 1, 5, 22, 108
