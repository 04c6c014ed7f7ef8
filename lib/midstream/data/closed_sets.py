"""Questions whose right answers code can list: closed answer sets with an exact judge.

Colours are those that matplotlib names (CSS and the xkcd survey), keywords are those of the running Python, months and
weekdays come from `calendar`, Greek letters from `unicodedata`; the other sets are common knowledge, typed here.
"""

from __future__ import annotations

import calendar
import keyword
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

_COUNTRIES = """Afghanistan=Kabul|Albania=Tirana|Algeria=Algiers|Andorra=Andorra la Vella|Angola=Luanda
Antigua and Barbuda=Saint John's/St. John's|Argentina=Buenos Aires|Armenia=Yerevan|Australia=Canberra|Austria=Vienna
Azerbaijan=Baku|Bahamas=Nassau|Bahrain=Manama|Bangladesh=Dhaka|Barbados=Bridgetown|Belarus=Minsk|Belgium=Brussels
Belize=Belmopan|Benin=Porto-Novo|Bhutan=Thimphu|Bolivia=La Paz/Sucre|Bosnia and Herzegovina/Bosnia=Sarajevo
Botswana=Gaborone|Brazil=Brasilia|Brunei=Bandar Seri Begawan|Bulgaria=Sofia|Burkina Faso=Ouagadougou
Burundi=Gitega/Bujumbura|Cambodia=Phnom Penh|Cameroon=Yaounde|Canada=Ottawa|Cape Verde/Cabo Verde=Praia
Central African Republic=Bangui|Chad=N'Djamena|Chile=Santiago|China/People's Republic of China=Beijing/Peking
Colombia=Bogota|Comoros=Moroni|Republic of the Congo/Congo=Brazzaville
Democratic Republic of the Congo/DR Congo=Kinshasa|Costa Rica=San Jose|Croatia=Zagreb|Cuba=Havana|Cyprus=Nicosia
Czech Republic/Czechia=Prague|Denmark=Copenhagen|Djibouti=Djibouti/Djibouti City|Dominica=Roseau
Dominican Republic=Santo Domingo|Ecuador=Quito|Egypt=Cairo|El Salvador=San Salvador|Equatorial Guinea=Malabo
Eritrea=Asmara|Estonia=Tallinn|Eswatini/Swaziland=Mbabane/Lobamba|Ethiopia=Addis Ababa|Fiji=Suva|Finland=Helsinki
France=Paris|Gabon=Libreville|Gambia=Banjul|Georgia=Tbilisi|Germany=Berlin|Ghana=Accra|Greece=Athens
Grenada=Saint George's/St. George's|Guatemala=Guatemala City|Guinea=Conakry|Guinea-Bissau=Bissau|Guyana=Georgetown
Haiti=Port-au-Prince|Honduras=Tegucigalpa|Hungary=Budapest|Iceland=Reykjavik|India=New Delhi/Delhi|Indonesia=Jakarta
Iran=Tehran|Iraq=Baghdad|Ireland/Republic of Ireland=Dublin|Israel=Jerusalem|Italy=Rome
Ivory Coast/Cote d'Ivoire=Yamoussoukro|Jamaica=Kingston|Japan=Tokyo|Jordan=Amman|Kazakhstan=Astana/Nur-Sultan
Kenya=Nairobi|Kiribati=Tarawa/South Tarawa|Kosovo=Pristina|Kuwait=Kuwait City|Kyrgyzstan=Bishkek|Laos=Vientiane
Latvia=Riga|Lebanon=Beirut|Lesotho=Maseru|Liberia=Monrovia|Libya=Tripoli|Liechtenstein=Vaduz|Lithuania=Vilnius
Luxembourg=Luxembourg/Luxembourg City|Madagascar=Antananarivo|Malawi=Lilongwe|Malaysia=Kuala Lumpur|Maldives=Male
Mali=Bamako|Malta=Valletta|Marshall Islands=Majuro|Mauritania=Nouakchott|Mauritius=Port Louis|Mexico=Mexico City
Micronesia/Federated States of Micronesia=Palikir|Moldova=Chisinau|Monaco=Monaco|Mongolia=Ulaanbaatar/Ulan Bator
Montenegro=Podgorica|Morocco=Rabat|Mozambique=Maputo|Myanmar/Burma=Naypyidaw|Namibia=Windhoek|Nauru=Yaren
Nepal=Kathmandu|Netherlands/Holland=Amsterdam|New Zealand=Wellington|Nicaragua=Managua|Niger=Niamey|Nigeria=Abuja
North Korea=Pyongyang|North Macedonia/Macedonia=Skopje|Norway=Oslo|Oman=Muscat|Pakistan=Islamabad|Palau=Ngerulmud
Palestine=Ramallah|Panama=Panama City|Papua New Guinea=Port Moresby|Paraguay=Asuncion|Peru=Lima|Philippines=Manila
Poland=Warsaw|Portugal=Lisbon|Qatar=Doha|Romania=Bucharest|Russia/Russian Federation=Moscow|Rwanda=Kigali
Saint Kitts and Nevis=Basseterre|Saint Lucia=Castries|Saint Vincent and the Grenadines=Kingstown|Samoa=Apia
San Marino=San Marino|Sao Tome and Principe=Sao Tome|Saudi Arabia=Riyadh|Senegal=Dakar|Serbia=Belgrade
Seychelles=Victoria|Sierra Leone=Freetown|Singapore=Singapore|Slovakia=Bratislava|Slovenia=Ljubljana
Solomon Islands=Honiara|Somalia=Mogadishu|South Africa=Pretoria/Cape Town/Bloemfontein|South Korea/Korea=Seoul
South Sudan=Juba|Spain=Madrid|Sri Lanka=Colombo/Sri Jayawardenepura Kotte|Sudan=Khartoum|Suriname=Paramaribo
Sweden=Stockholm|Switzerland=Bern/Berne|Syria=Damascus|Taiwan=Taipei|Tajikistan=Dushanbe|Tanzania=Dodoma
Thailand=Bangkok|Timor-Leste/East Timor=Dili|Togo=Lome|Tonga=Nuku'alofa|Trinidad and Tobago=Port of Spain
Tunisia=Tunis|Turkey/Turkiye=Ankara|Turkmenistan=Ashgabat|Tuvalu=Funafuti|Uganda=Kampala|Ukraine=Kyiv/Kiev
United Arab Emirates/UAE=Abu Dhabi|United Kingdom/UK/Great Britain=London
United States/United States of America/USA/US=Washington/Washington D.C./Washington DC|Uruguay=Montevideo
Uzbekistan=Tashkent|Vanuatu=Port Vila|Vatican City/Holy See=Vatican City|Venezuela=Caracas|Vietnam=Hanoi|Yemen=Sanaa
Zambia=Lusaka|Zimbabwe=Harare"""

_ELEMENTS = """Hydrogen Helium Lithium Beryllium Boron Carbon Nitrogen Oxygen Fluorine Neon Sodium Magnesium
Aluminium/Aluminum Silicon Phosphorus Sulfur/Sulphur Chlorine Argon Potassium Calcium Scandium Titanium Vanadium
Chromium Manganese Iron Cobalt Nickel Copper Zinc Gallium Germanium Arsenic Selenium Bromine Krypton Rubidium Strontium
Yttrium Zirconium Niobium Molybdenum Technetium Ruthenium Rhodium Palladium Silver Cadmium Indium Tin Antimony
Tellurium Iodine Xenon Caesium/Cesium Barium Lanthanum Cerium Praseodymium Neodymium Promethium Samarium Europium
Gadolinium Terbium Dysprosium Holmium Erbium Thulium Ytterbium Lutetium Hafnium Tantalum Tungsten Rhenium Osmium
Iridium Platinum Gold Mercury Thallium Lead Bismuth Polonium Astatine Radon Francium Radium Actinium Thorium
Protactinium Uranium Neptunium Plutonium Americium Curium Berkelium Californium Einsteinium Fermium Mendelevium
Nobelium Lawrencium Rutherfordium Dubnium Seaborgium Bohrium Hassium Meitnerium Darmstadtium Roentgenium Copernicium
Nihonium Flerovium Moscovium Livermorium Tennessine Oganesson"""

_STATES = """Alabama|Alaska|Arizona|Arkansas|California|Colorado|Connecticut|Delaware|Florida|Georgia|Hawaii|Idaho
Illinois|Indiana|Iowa|Kansas|Kentucky|Louisiana|Maine|Maryland|Massachusetts|Michigan|Minnesota|Mississippi|Missouri
Montana|Nebraska|Nevada|New Hampshire|New Jersey|New Mexico|New York|North Carolina|North Dakota|Ohio|Oklahoma|Oregon
Pennsylvania|Rhode Island|South Carolina|South Dakota|Tennessee|Texas|Utah|Vermont|Virginia|Washington|West Virginia
Wisconsin|Wyoming"""

_BIBLE = """Genesis|Exodus|Leviticus|Numbers|Deuteronomy|Joshua|Judges|Ruth|1 Samuel/First Samuel/Samuel
2 Samuel/Second Samuel|1 Kings/First Kings/Kings|2 Kings/Second Kings|1 Chronicles/First Chronicles/Chronicles
2 Chronicles/Second Chronicles|Ezra|Nehemiah|Esther|Job|Psalms/Psalm|Proverbs|Ecclesiastes
Song of Solomon/Song of Songs|Isaiah|Jeremiah|Lamentations|Ezekiel|Daniel|Hosea|Joel|Amos|Obadiah|Jonah|Micah|Nahum
Habakkuk|Zephaniah|Haggai|Zechariah|Malachi|Matthew|Mark|Luke|John|Acts/Acts of the Apostles|Romans
1 Corinthians/First Corinthians/Corinthians|2 Corinthians/Second Corinthians|Galatians|Ephesians|Philippians
Colossians|1 Thessalonians/First Thessalonians/Thessalonians|2 Thessalonians/Second Thessalonians
1 Timothy/First Timothy/Timothy|2 Timothy/Second Timothy|Titus|Philemon|Hebrews|James|1 Peter/First Peter/Peter
2 Peter/Second Peter|1 John/First John|2 John/Second John|3 John/Third John|Jude|Revelation/Revelations"""

_PRESIDENTS = """George Washington/Washington|John Adams/Adams|Thomas Jefferson/Jefferson|James Madison/Madison
James Monroe/Monroe|John Quincy Adams|Andrew Jackson/Jackson|Martin Van Buren/Van Buren
William Henry Harrison/Harrison|John Tyler/Tyler|James K. Polk/James Polk/Polk|Zachary Taylor/Taylor
Millard Fillmore/Fillmore|Franklin Pierce/Pierce|James Buchanan/Buchanan|Abraham Lincoln/Lincoln
Andrew Johnson/Johnson|Ulysses S. Grant/Ulysses Grant/Grant|Rutherford B. Hayes/Rutherford Hayes/Hayes
James A. Garfield/James Garfield/Garfield|Chester A. Arthur/Chester Arthur/Arthur|Grover Cleveland/Cleveland
Benjamin Harrison|William McKinley/McKinley|Theodore Roosevelt/Teddy Roosevelt/Roosevelt
William Howard Taft/William Taft/Taft|Woodrow Wilson/Wilson|Warren G. Harding/Warren Harding/Harding
Calvin Coolidge/Coolidge|Herbert Hoover/Hoover|Franklin D. Roosevelt/Franklin Roosevelt/FDR|Harry S. Truman/Harry Truman
Dwight D. Eisenhower/Dwight Eisenhower/Eisenhower|John F. Kennedy/JFK/Kennedy|Lyndon B. Johnson/Lyndon Johnson
Richard Nixon/Richard M. Nixon/Nixon|Gerald Ford/Gerald R. Ford/Ford|Jimmy Carter/Carter|Ronald Reagan/Reagan
George H. W. Bush/George Bush/Bush|Bill Clinton/Clinton|George W. Bush|Barack Obama/Obama|Donald Trump/Trump
Joe Biden/Biden"""

_PLAYS = """All's Well That Ends Well|Antony and Cleopatra|As You Like It|The Comedy of Errors|Coriolanus|Cymbeline
Hamlet|Henry IV/Henry IV, Part 1/Henry IV, Part 2|Henry V|Henry VI/Henry VI, Part 1|Henry VIII|Julius Caesar|King John
King Lear|Love's Labour's Lost/Love's Labor's Lost|Macbeth|Measure for Measure|The Merchant of Venice
The Merry Wives of Windsor|A Midsummer Night's Dream|Much Ado About Nothing|Othello|Pericles|Richard II|Richard III
Romeo and Juliet|The Taming of the Shrew|The Tempest|Timon of Athens|Titus Andronicus|Troilus and Cressida
Twelfth Night|The Two Gentlemen of Verona|The Two Noble Kinsmen|The Winter's Tale"""

_ZODIAC = "Aries|Taurus|Gemini|Cancer|Leo|Virgo|Libra|Scorpio|Sagittarius|Capricorn|Aquarius|Pisces"


@dataclass(frozen=True)
class ClosedSet:
    """A kind of thing, in the plural, and everything that is of this kind: accepted spelling → its canonical name."""

    plural: str
    names: Mapping[str, str]

    def __len__(self) -> int:
        return len(set(self.names.values()))

    def judge(self, answer: str) -> str | None:
        """The canonical name that an answer means, or None where it names no member of the set."""
        return self.names.get(normal(answer))


def normal(text: str) -> str:
    """A spelling without case, accents, surrounding punctuation, a leading article and repeated spaces."""
    plain = unicodedata.normalize("NFKD", text.replace("’", "'")).encode("ascii", "ignore").decode().casefold()
    plain = re.sub(r"\s+", " ", plain.replace("-", " ")).strip(" .,;:!?'\"()[]{}*`_")
    return plain.removeprefix("the ")


@cache
def closed_sets() -> dict[str, ClosedSet]:
    """Every closed set under its short name."""
    from matplotlib.colors import CSS4_COLORS, XKCD_COLORS

    pairs = [pair.split("=") for pair in _lines(_COUNTRIES)]
    colours = [*CSS4_COLORS, *(name.removeprefix("xkcd:") for name in XKCD_COLORS)]
    greek = {unicodedata.name(chr(code)).rsplit(" ", 1)[-1] for code in range(0x3B1, 0x3CA) if code != 0x3C2}
    return {
        "capitals": _set("capital cities", [capital for _, capital in pairs]),
        "countries": _set("countries", [country for country, _ in pairs]),
        "elements": _set("chemical elements", _ELEMENTS.split()),
        "colours": _set("colors", colours),
        "states": _set("US states", _lines(_STATES)),
        "months": _set("months of the year", list(calendar.month_name)[1:]),
        "keywords": _set("Python keywords", keyword.kwlist),
        "bible": _set("books of the Bible", _lines(_BIBLE)),
        "presidents": _set("US presidents", _lines(_PRESIDENTS)),
        "plays": _set("plays by Shakespeare", _lines(_PLAYS)),
        "zodiac": _set("zodiac signs", _lines(_ZODIAC)),
        "greek": _set("Greek letters", sorted(name.replace("LAMDA", "LAMBDA/LAMDA") for name in greek)),
        "weekdays": _set("days of the week", list(calendar.day_name)),
    }


def _lines(text: str) -> list[str]:
    return text.replace("\n", "|").split("|")


def _set(plural: str, members: Sequence[str]) -> ClosedSet:
    """Members are written `name/other spelling/…`; the first spelling is the canonical name."""
    spellings = [(spelling, member.split("/")[0]) for member in members for spelling in member.split("/")]
    return ClosedSet(plural, {normal(spelling): normal(name) for spelling, name in spellings})
