package nbd

import (
	"context"
	"errors"
	"strings"
	"syscall"
)

// Error codes of replies. They are numbers of the protocol, whatever the host's errno values.
const (
	codePerm     = 1
	codeIO       = 5
	codeNoMem    = 12
	codeInval    = 22
	codeNoSpace  = 28
	codeOverflow = 75
	codeNotSup   = 95
	codeShutdown = 108
)

// codeOf gives the error code that tells a client of a device's error.
func codeOf(err error) uint32 {
	var errno syscall.Errno
	switch {
	case errors.Is(err, context.Canceled):
		return codeShutdown
	case errors.Is(err, errors.ErrUnsupported):
		return codeNotSup
	case !errors.As(err, &errno):
		return codeIO
	}
	switch errno {
	case syscall.EPERM, syscall.EACCES, syscall.EROFS:
		return codePerm
	case syscall.ENOMEM:
		return codeNoMem
	case syscall.EINVAL:
		return codeInval
	case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
		return codeNoSpace
	case syscall.EOVERFLOW:
		return codeOverflow
	case syscall.ESHUTDOWN:
		return codeShutdown
	}
	return codeIO
}

// errnoOf gives the error that a reply's code stands for. Codes that the protocol does not
// know count as EINVAL, as it asks.
func errnoOf(code uint32) syscall.Errno {
	switch code {
	case codePerm:
		return syscall.EPERM
	case codeIO:
		return syscall.EIO
	case codeNoMem:
		return syscall.ENOMEM
	case codeNoSpace:
		return syscall.ENOSPC
	case codeOverflow:
		return syscall.EOVERFLOW
	case codeNotSup:
		return syscall.ENOTSUP
	case codeShutdown:
		return syscall.ESHUTDOWN
	}
	return syscall.EINVAL
}

// messageText makes a text fit for a reply: UTF-8, no NUL, no longer than the protocol allows.
func messageText(s string) string {
	if len(s) > maxString {
		s = s[:maxString]
	}
	return strings.ReplaceAll(strings.ToValidUTF8(s, ""), "\x00", "")
}
