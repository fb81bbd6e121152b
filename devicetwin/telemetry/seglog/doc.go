// Package seglog is a queue on disk: records are appended to segments of a few
// megabytes, read by any number of readers, each with a cursor of its own, and
// go away by segment when bounds of bytes, age or free disk are reached.
//
// It owns when a record is on the disk: Append returns when it is, together with
// all that others appended meanwhile; Offer returns at once, and the power takes
// at most Config.FlushEvery. Readers see what is on the disk only, so an ID,
// incarnation-segment-offset, never names two different records.
//
// Full segments are compressed; a record keeps the offset it was appended at,
// and so its ID. What bounds, a full disk or damage take away shows as a gap
// record to each reader that had not been there yet.
//
// It never looks into a payload, and holds no cursors: the caller keeps them.
//
// On disk, in Config.Dir:
//
//	%016x.log               a segment as appended
//	%016x.N.K.L.zst         the same, zstd; K of its N records are left after L thinnings
//	gaps.json               how many records went with dropped segments
//
//	segment  = header record…           zst = zstd(header { offset index record }…)
//	header   = "SKSEGL01" incarnation[8] segment[8] created[8] crc[4]
//	record   = len[4] crc[4] kind[1] ts[8] payload        len counts from kind on
//
// Numbers are little endian. The crc (CRC-32C) of a record also covers its
// segment and offset, so that nothing left over in a block reads as a record.
package seglog
