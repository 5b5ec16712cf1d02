package memsync

// Numbers of QEMU's migration stream: migration/savevm.h, migration/ram.h and
// migration/migration.h. The package's documentation shows where they stand.
const (
	streamMagic   = 0x5145564d
	streamVersion = 3

	sectionEnd           = 0x00
	sectionStart         = 0x01
	sectionPart          = 0x02
	sectionLast          = 0x03
	sectionSubsection    = 0x05
	sectionDescription   = 0x06
	sectionConfiguration = 0x07
	sectionCommand       = 0x08
	sectionFooter        = 0x7e

	commandOpenReturnPath = 1
	commandPackaged       = 7

	ramName    = "ram"
	ramVersion = 4

	flagZero         = 0x02
	flagSizes        = 0x04
	flagPage         = 0x08
	flagContentsEnd  = 0x10
	flagContinue     = 0x20
	flagXbzrle       = 0x40
	flagCompressed   = 0x100
	flagMultifdFlush = 0x200

	messageShut   = 1
	messageBitmap = 5
)

const defaultPageBits = 12

// Bounds on what a stream may claim; beyond them it passes opaquely.
const (
	maxRAM         = 16 << 40
	maxBlocks      = 4096
	maxMachineName = 1024
	maxCompressed  = 128 << 10 // a page of 64 KiB that grew under zlib
	maxDescription = 16 << 20
)
