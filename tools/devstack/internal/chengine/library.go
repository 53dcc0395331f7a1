package chengine

import (
	"fmt"
	"unsafe"

	"github.com/ebitengine/purego"
)

// library is the part of libchdb's C interface that this package uses; chdb.h
// in chdb's sources describes it. Every handle must be released with its
// destroy or close function.
type library struct {
	setSignalHandlersEnabled func(enabled int32)

	connect func(argc int32, argv **byte) *unsafe.Pointer
	close   func(connection *unsafe.Pointer)

	query         startStatement
	streamQuery   startStatement
	fetchResult   func(connection, stream unsafe.Pointer) unsafe.Pointer
	cancelQuery   func(connection, stream unsafe.Pointer)
	destroyResult func(result unsafe.Pointer)

	resultError            func(result unsafe.Pointer) string
	resultBuffer           func(result unsafe.Pointer) *byte
	resultLength           func(result unsafe.Pointer) uintptr
	resultRows             func(result unsafe.Pointer) uint64
	resultStorageRowsRead  func(result unsafe.Pointer) uint64
	resultStorageBytesRead func(result unsafe.Pointer) uint64
	resultRowsWritten      func(result unsafe.Pointer) uint64
	resultBytesWritten     func(result unsafe.Pointer) uint64

	streamInsert  startStatement
	insertError   func(insert unsafe.Pointer) string
	insertAppend  func(insert unsafe.Pointer, data *byte, length uintptr) int32
	insertDone    func(insert unsafe.Pointer) unsafe.Pointer
	destroyInsert func(insert unsafe.Pointer)
}

// startStatement is the common signature of the three functions that start a
// statement. Lengths count bytes, and no string needs a terminating zero.
type startStatement func(
	connection unsafe.Pointer,
	sql *byte, sqlLength uintptr,
	format *byte, formatLength uintptr,
	names **byte, nameLengths *uintptr,
	values **byte, valueLengths *uintptr,
	parameters uintptr,
) unsafe.Pointer

// loadLibrary maps libchdb from the file at path and binds its functions. The
// library stays mapped until the process ends.
func loadLibrary(path string) (*library, error) {
	handle, err := purego.Dlopen(path, purego.RTLD_NOW|purego.RTLD_LOCAL)
	if err != nil {
		return nil, fmt.Errorf("load libchdb: %w", err)
	}

	lib := new(library)
	for _, f := range []struct {
		pointer any
		symbol  string
	}{
		{&lib.setSignalHandlersEnabled, "chdb_set_signal_handlers_enabled"},
		{&lib.connect, "chdb_connect"},
		{&lib.close, "chdb_close_conn"},
		{&lib.query, "chdb_query_with_params_n"},
		{&lib.streamQuery, "chdb_stream_query_with_params_n"},
		{&lib.fetchResult, "chdb_stream_fetch_result"},
		{&lib.cancelQuery, "chdb_stream_cancel_query"},
		{&lib.destroyResult, "chdb_destroy_query_result"},
		{&lib.resultError, "chdb_result_error"},
		{&lib.resultBuffer, "chdb_result_buffer"},
		{&lib.resultLength, "chdb_result_length"},
		{&lib.resultRows, "chdb_result_rows_read"},
		{&lib.resultStorageRowsRead, "chdb_result_storage_rows_read"},
		{&lib.resultStorageBytesRead, "chdb_result_storage_bytes_read"},
		{&lib.resultRowsWritten, "chdb_result_rows_written"},
		{&lib.resultBytesWritten, "chdb_result_bytes_written"},
		{&lib.streamInsert, "chdb_stream_insert_with_params_n"},
		{&lib.insertError, "chdb_stream_insert_error"},
		{&lib.insertAppend, "chdb_stream_append"},
		{&lib.insertDone, "chdb_stream_done"},
		{&lib.destroyInsert, "chdb_destroy_insert_stream"},
	} {
		address, err := purego.Dlsym(handle, f.symbol)
		if err != nil {
			return nil, fmt.Errorf("bind %s of %s: %w", f.symbol, path, err)
		}
		purego.RegisterFunc(f.pointer, address)
	}
	return lib, nil
}
